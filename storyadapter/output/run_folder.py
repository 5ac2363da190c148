"""The output folder of a run: its pictures, its record, and what a resumed run finds in it."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from filelock import FileLock
from PIL import Image

from storyadapter.method.errors import Field, InputError, Text
from storyadapter.method.events import FrameFinished
from storyadapter.output.animation import Form, animation, extent
from storyadapter.output.files import (
    ANOTHER_FOLDER,
    LOCK_NAME,
    is_full,
    is_part,
    lock_folder,
    make_folder,
    sha256,
    write_atomically,
    write_error,
)
from storyadapter.output.frame_files import (
    encode_png,
    frame_path,
    iteration_name,
    job_text,
    numbered,
    opens,
    read_frame,
    read_picture,
)
from storyadapter.output.lettering import Lettering
from storyadapter.output.overview import THUMBNAILS_NAME, ThumbnailStrips
from storyadapter.output.run_record import (
    RECORD_NAME,
    IterationRecord,
    RunRecord,
    Session,
    UnderWay,
    json_values,
    refuse_foreign,
    stored_or_new,
)
from storyadapter.output.staying_frames import StayingFrames
from storyadapter.runtime.frame_store import StoredFrame

_WORKERS: Final = min(4, os.cpu_count() or 1)
_OUR_FOLDER = re.compile(rf"iteration-\d{{2,}}|frames|{re.escape(THUMBNAILS_NAME)}")


class RunFolder:
    """The output folder of one run, locked as long as it is open; use `RunFolder.open(…)` in a `with` statement.

    Layout, under the folder that was asked for:

    - `iteration-00/frame-000.png` …: every frame, with the texts of `text` in it;
    - `frames/000.png` …: copies of the last iteration's; `contact-sheet.png`; `story.gif` or `.webp`;
    - `story.json`: see `RunRecord`;
    - `.thumbnails/iteration-00.png` …: a row of the contact sheet each, so that the sheet can be drawn when the
      pictures are removed (`keep="last"`), and without reading a thousand pictures again; `.lock`.

    Every file appears under its name only when it is whole and on the disk, so a process may be killed at any moment.
    An iteration counts as finished when `story.json` says so, which is written after its frames, and all its pictures
    are those that were written. Frames of an unfinished one are found again by the keys of their jobs: the folder is a
    `storyadapter.runtime.frame_store.FrameStore`.

    Attributes:
        path: the folder.
        notices: one line per picture that has to be drawn again because it isn't what was written.
        seconds: that `finish_iteration` took.
        earlier_details: `details` of the processes that worked on the run before.
    """

    def __init__(
        self,
        path: Path,
        record: RunRecord,
        keep: Literal["all", "last"],
        lock: FileLock,
        text: Callable[[FrameFinished], Mapping[str, str]],
    ) -> None:
        """Use `RunFolder.open`."""
        self.path = path
        self.notices: tuple[Text, ...] = ()
        self.seconds = 0.0
        self.earlier_details = tuple(session.details for session in record.sessions)
        self._record = record
        self._earlier = record.iterations
        self._keep = keep
        self._lock = lock
        self._text = text
        self._strips = ThumbnailStrips(path / THUMBNAILS_NAME, record.frames, len(record.scales))
        self._staying = StayingFrames(path, record, self._strips)
        self._workers = ThreadPoolExecutor(_WORKERS, "pictures")
        # of iterations that aren't finished, by iteration and frame: what the contact sheet shows, and the file's hash
        self._written: dict[tuple[int, int], tuple[Image.Image, str]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        identity: Mapping[str, Any],
        *,
        frames: int,
        scales: Sequence[float | None],
        resume: bool = False,
        keep: Literal["all", "last"] = "all",
        details: Mapping[str, Any] | None = None,
        text: Callable[[FrameFinished], Mapping[str, str]] = lambda frame: {},
        edited: bool = False,
    ) -> Self:
        """Lock a new or empty folder, or with `resume` that of a run with the same identity, finished or not, which may
        have more iterations now, or more frames at the end.

        Args:
            path: made if it isn't there.
            identity: everything that decides the pictures, as JSON values: equal ones make the same pictures.
            frames: N, the frames of one iteration.
            scales: λ of every iteration, the text-only one (None) first.
            keep: "last" removes the pictures of older iterations when the next one is finished.
            text: PNG text chunks of a frame, besides those that say by which job it was drawn.
            details: what is worth knowing but doesn't decide the pictures: versions, split into micro-batches, …
            edited: whether it may be a run that was edited, whose last edit is finished then.

        Raises:
            InputError: the folder is a file, can't be written, is in use, or holds anything else: other files, a run
                with another identity (the text names the first difference), or this run without `resume`. Nothing was
                written.
            RunError: no space is left.
        """
        path = Path(path)
        refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_full(error):
                raise write_error(path, error) from error
            raise InputError(f"{path} can't be made: {error.strerror}", advice=ANOTHER_FOLDER) from error
        lock = lock_folder(path)
        try:
            refuse_foreign(path)  # again: another process may have been faster
            given = RunRecord(json_values(identity), frames, tuple(scales))
            record = stored_or_new(path, given, resume, edited)
            folder = cls(path, record, keep, lock, text)
            folder._recover(Session(0, json_values(details or {})))
        except BaseException:
            lock.release()
            raise
        return folder

    @staticmethod
    def check(
        path: str | Path,
        identity: Mapping[str, Any],
        *,
        frames: int,
        scales: Sequence[float | None],
        resume: bool = False,
        edited: bool = False,
    ) -> None:
        """Refuse what `open` would refuse, without writing anything: for a program that is slow until it opens it.

        Raises:
            InputError: as `open`.
        """
        path = Path(path)
        refuse_foreign(path)
        parent = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            reason = "can't be written" if parent.is_dir() else "is no folder"
            raise InputError(f"{path} can't be made: {parent} {reason}", advice=ANOTHER_FOLDER)
        if (path / LOCK_NAME).exists():
            lock_folder(path).release()
        stored_or_new(path, RunRecord(json_values(identity), frames, tuple(scales)), resume, edited)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Frames that no thread has begun to write aren't written. Safe to call twice."""
        self._workers.shutdown(cancel_futures=True)
        self._lock.release()

    def finished_iterations(self) -> int:
        """How many iterations, from the text-only one on, are finished: also the number of the next one to make."""
        return len(self._record.iterations)

    def frame_path(self, iteration: int, frame: int) -> Path:
        """Where a frame's picture lies; both are counted from 0."""
        counts = {"iterations": len(self._record.scales), "frames": self._record.frames}
        return frame_path(self.path, iteration, frame, **counts)

    @property
    def stays(self) -> frozenset[int]:
        """See `FrameStore.stays`."""
        return self._record.stays

    def kept_from(self) -> int:
        """The first iteration whose frames are kept: those before it were removed, see `keep`."""
        return sum(iteration.removed for iteration in self._record.iterations)

    def find(self, iteration: int, frame: int, key: str) -> StoredFrame | None:
        """See `FrameStore.find`."""
        if frame in self.stays:
            staying = self._staying.find(iteration, frame)
            if staying is not None and iteration >= self.finished_iterations():
                self._written[iteration, frame] = self._staying.thumbnail(iteration, frame), staying.sha256
            return staying.stored if staying else None
        path = self.frame_path(iteration, frame)
        found = read_frame(path)
        if found is None or found.key != key:
            return None
        if iteration >= self.finished_iterations() and (iteration, frame) not in self._written:
            self._note(iteration, frame, found.picture(), path.read_bytes())
        return found

    def split(self, iteration: int) -> tuple[int, ...] | None:
        """See `FrameStore.split`."""
        if iteration < len(self._earlier):
            return self._earlier[iteration].split
        under_way = self._record.under_way
        return under_way.split if under_way and under_way.iteration == iteration else None

    def begin_iteration(self, iteration: int, split: Sequence[int]) -> None:
        """See `FrameStore.begin_iteration`. Raises RunError: no space is left, or the folder can't be written."""
        self._write_record(replace(self._record, under_way=UnderWay(iteration, tuple(split))))

    def save(self, frame: FrameFinished) -> Future[None]:
        """See `FrameStore.save`."""
        return self._workers.submit(self._save, frame)

    def finish_iteration(
        self, iteration: int, seconds: Mapping[str, float], split: Sequence[int] = (), decoded_again: Sequence[int] = ()
    ) -> None:
        """See `FrameStore.finish_iteration`. What `keep` says goes is removed; nothing to do for one that is finished.

        Raises:
            RunError: no space is left, or the folder can't be written.
            ValueError: another iteration, or frames are missing.
        """
        if iteration < self.finished_iterations():
            return
        started = time.perf_counter()
        places = [(iteration, frame) for frame in range(self._record.frames)]
        missing = [frame for _, frame in places if (iteration, frame) not in self._written]
        if iteration != self.finished_iterations() or missing:
            raise ValueError(f"iteration {iteration} can't be finished: frames {missing} are missing")
        thumbnails, hashes = zip(*(self._written.pop(place) for place in places), strict=True)
        strip = self._strips.write(iteration, thumbnails)
        if not seconds and iteration < len(self._earlier):  # it was drawn before, and something of it again
            seconds = self._earlier[iteration].seconds
        settings = self._record.scales[iteration], dict(seconds), False, tuple(split), hashes
        done = IterationRecord(*settings, hashlib.sha256(strip).hexdigest(), tuple(decoded_again))
        record = replace(self._record.with_iteration(done), under_way=None)
        if self._keep == "last":
            record = record.with_removed(iteration)
        self._write_record(record)
        if self._keep == "last":
            self._remove_pictures(range(iteration))
        self.seconds += time.perf_counter() - started

    def finish(
        self,
        seconds: Mapping[str, float],
        captions: Sequence[str],
        title: str | None = None,
        *,
        form: Form = "gif",
        lettering: Lettering | None = None,
        start: Mapping[str, float] | None = None,
    ) -> tuple[Text, ...]:
        """Write `frames/`, the contact sheet, the animation, and the end of `story.json`, once all iterations are
        finished.

        Args:
            seconds, start: of this process's part of the run, see `run_record.Session`.
            captions: one per frame, shown on the contact sheet, with the title, where there is room.
            form: of the animation.
            lettering: what text is drawn with.

        Returns:
            What isn't shown as it is.

        Raises:
            RunError: no space is left, or the folder can't be written.
            ValueError: iterations are missing, or there isn't a caption per frame.
        """
        last = self.finished_iterations() - 1
        if last + 1 != (planned := len(self._record.scales)) or len(captions) != self._record.frames:
            raise ValueError(f"{last + 1} of {planned} iterations are finished; {len(captions)} captions")
        folder, paths = self.path / "frames", self._frame_paths(last)
        lettering = lettering or Lettering()
        moving = self.path / f"story.{form}"
        shown = extent(moving.name, read_picture(paths[0]).size, len(paths))
        write_atomically(moving, animation(form, shown, lambda frame: read_picture(paths[frame]), self._workers))
        make_folder(folder)
        for frame, path in enumerate(paths):
            write_atomically(folder / f"{numbered(frame, self._record.frames)}.png", path.read_bytes())
        sheet = self._strips.sheet(self._record.scales, captions, title, lettering)
        write_atomically(self.path / "contact-sheet.png", encode_png(sheet, {}))
        *earlier, session = self._record.sessions
        sessions = (*earlier, replace(session, seconds=dict(seconds), start=dict(start or {})))
        self._write_record(replace(self._record, sessions=sessions, finished=True, before=()))
        notices = (shown.notice, lettering.notice((*captions, title or "")))
        return tuple(notice for notice in notices if notice)

    def _recover(self, session: Session) -> None:
        """Bring the folder in line with what is there: after a kill, a full disk, or a picture that was damaged."""
        for folder in [self.path, *(item for item in self.path.iterdir() if _OUR_FOLDER.fullmatch(item.name))]:
            for item in folder.iterdir() if folder.is_dir() else ():
                if is_part(item) and not item.is_dir():
                    item.unlink(missing_ok=True)
        count = self._whole_iterations()
        iterations = self._record.iterations[:count]
        sessions = (*self._record.sessions, replace(session, first_iteration=count))
        self._write_record(replace(self._record, iterations=iterations, sessions=sessions, finished=False))
        self._remove_pictures(index for index, iteration in enumerate(iterations) if iteration.removed)

    def _whole_iterations(self) -> int:
        """How many iterations, from the first on, have everything a resumed run needs; what is damaged is removed."""
        count, whole = 0, True
        for index in range(len(self._record.scales)):
            done = self._record.iterations[index] if index < len(self._record.iterations) else None
            strip = self._strips.path(index)
            strip_is_whole = done is not None and sha256(strip) == done.thumbnails_sha256
            if done and done.removed:
                if not strip_is_whole:
                    whole = self._tell_damage(strip)
            else:
                paths = self._frame_paths(index)
                for frame, path in enumerate(paths):
                    if frame in self.stays and self._staying.is_removed(index):
                        continue
                    good = sha256(path) in done.sha256[frame : frame + 1] if done else not path.exists() or opens(path)
                    if not good:
                        whole = self._tell_damage(path)
                if whole and done and not strip_is_whole:  # it follows from the frames
                    self._strips.write(index, [self._strips.thumbnail(read_picture(path)) for path in paths])
            if whole and done:
                count = index + 1
        if count and self._record.iterations[count - 1].removed:
            # What the next iteration would read is gone, so there is nothing to go on from.
            removed = ("older iterations were removed (", Field("keep"), " last): all iterations are made again")
            self.notices = (*self.notices, removed)
            return 0
        return count

    def _tell_damage(self, path: Path) -> Literal[False]:
        if path.is_dir():
            found = f"{path} is a folder, where a picture of this run belongs"
            raise InputError(found, advice="move it away", field="out")
        self.notices = (*self.notices, f"{path} isn't the picture that was written: it is drawn again")
        path.unlink(missing_ok=True)
        return False

    def _save(self, frame: FrameFinished) -> None:
        data = encode_png(frame.picture, {**self._text(frame), **job_text(frame)})
        path = self.frame_path(frame.iteration, frame.frame)
        make_folder(path.parent)
        write_atomically(path, data)
        self._note(frame.iteration, frame.frame, frame.picture, data)

    def _note(self, iteration: int, frame: int, image: Image.Image, data: bytes) -> None:
        self._written[iteration, frame] = (self._strips.thumbnail(image), hashlib.sha256(data).hexdigest())

    def _write_record(self, record: RunRecord) -> None:
        write_atomically(self.path / RECORD_NAME, record.to_json())
        self._record = record

    def _remove_pictures(self, iterations: Iterable[int]) -> None:
        """Remove the frames of these iterations, and nothing else that somebody may have put beside them."""
        for iteration in iterations:
            folder = self._iteration_path(iteration)
            if not folder.is_dir():
                continue
            for path in self._frame_paths(iteration):
                path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()

    def _frame_paths(self, iteration: int) -> list[Path]:
        return [self.frame_path(iteration, frame) for frame in range(self._record.frames)]

    def _iteration_path(self, iteration: int) -> Path:
        return self.path / iteration_name(iteration, len(self._record.scales))
