"""The output folder of a run: its pictures, its record, and what a resumed run finds in it."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from storyadapter.method.errors import Field, InputError, RunError, Text
from storyadapter.output.animation import gif
from storyadapter.output.contact_sheet import Row, contact_sheet, join, scaled, thumbnail_size
from storyadapter.output.files import (
    ANOTHER_FOLDER,
    LOCK_NAME,
    is_full,
    is_part,
    lock_folder,
    write_atomically,
    write_error,
)
from storyadapter.output.run_record import IterationRecord, RunRecord, Session, first_difference, json_values

RECORD_NAME = "story.json"
THUMBNAILS_NAME = ".thumbnails"
_ANOTHER_ONE = ("choose another one with ", Field("out"))

_OUR_FOLDER = re.compile(rf"iteration-\d{{2,}}|frames|{re.escape(THUMBNAILS_NAME)}")


class RunFolder:
    """The output folder of one run, locked as long as it is open; use `RunFolder.open(…)` in a `with` statement.

    Layout, under the folder that was asked for:

    - `iteration-00/frame-000.png` …: every frame, with the texts given to `save_frame` in it;
    - `frames/000.png` …: copies of the last iteration's; `contact-sheet.png`; `story.gif`;
    - `story.json`: see `RunRecord`;
    - `.thumbnails/iteration-00.png` …: a row of the contact sheet each, so that the sheet can be drawn when the
      pictures are removed (`keep="last"`), and without reading a thousand pictures again; `.lock`.

    Every file appears under its name only when it is whole and on the disk, so a process may be killed at any moment.
    An iteration counts as finished when `story.json` says so, which is written after its frames, and all its pictures
    open.

    Attributes:
        path: the folder.
        notices: one line per finished iteration that has to be made again because a picture of it doesn't open.
    """

    def __init__(self, path: Path, record: RunRecord, keep: Literal["all", "last"], lock: FileLock) -> None:
        """Use `RunFolder.open`."""
        self.path = path
        self.notices: tuple[Text, ...] = ()
        self._record = record
        self._keep = keep
        self._lock = lock
        self._thumbnails: dict[int, Image.Image] = {}  # of the iteration that is being made
        self._frame_size: tuple[int, int] | None = None

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
    ) -> Self:
        """Lock a new or empty folder, or with `resume` that of a run with the same identity, finished or not.

        Args:
            path: the folder; made if it isn't there.
            identity: everything that decides the pictures (story, seed, steps, sizes, models, …), as JSON values. Two
                runs with equal identities make the same pictures.
            frames: N, the frames of one iteration.
            scales: λ of every iteration, the text-only one (None) first.
            resume: go on after the last finished iteration; what is unfinished is removed. A new or empty folder is
                started from the beginning.
            keep: "last" removes the pictures of older iterations when the next one is finished.
            details: what is worth knowing but doesn't decide the pictures: versions, split into micro-batches, …

        Raises:
            InputError: the folder is a file, can't be written, is in use, or holds anything else: other files, a run
                with another identity (the text names the first difference), or this run without `resume`. Nothing was
                written.
            RunError: no space is left.
        """
        path = Path(path)
        _refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_full(error):
                raise write_error(path, error) from error
            raise InputError(f"{path} can't be made: {error.strerror}", advice=ANOTHER_FOLDER) from error
        lock = lock_folder(path)
        try:
            _refuse_foreign(path)  # again: another process may have been faster
            given = RunRecord(json_values(identity), frames, tuple(scales))
            record = _stored_or_new(path, given, resume)
            folder = cls(path, record, keep, lock)
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
    ) -> None:
        """Refuse what `open` would refuse, without writing anything: for a program that is slow until it opens it.

        Raises:
            InputError: as `open`.
        """
        path = Path(path)
        _refuse_foreign(path)
        parent = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            reason = "can't be written" if parent.is_dir() else "is no folder"
            raise InputError(f"{path} can't be made: {parent} {reason}", advice=ANOTHER_FOLDER)
        if (path / LOCK_NAME).exists():
            lock_folder(path).release()
        _stored_or_new(path, RunRecord(json_values(identity), frames, tuple(scales)), resume)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Safe to call twice."""
        self._lock.release()

    def finished_iterations(self) -> int:
        """How many iterations, from the text-only one on, are finished: also the number of the next one to make."""
        return len(self._record.iterations)

    def frame_path(self, iteration: int, frame: int) -> Path:
        """Where a frame's picture lies; both are counted from 0."""
        return self._iteration_path(iteration) / f"frame-{self._number(frame)}.png"

    def save_frame(self, iteration: int, frame: int, image: Image.Image, text: Mapping[str, str]) -> Path:
        """Write one frame of the iteration that is being made, and return where.

        Args:
            iteration: must be `finished_iterations()`.
            frame: 0 … N-1.
            image: RGB, of one size for all frames of the run.
            text: PNG text chunks, keyword (at most 79 Latin-1 letters) -> text.

        Raises:
            RunError: no space is left, or the folder can't be written.
            ValueError: arguments other than these.
        """
        if iteration != self.finished_iterations() or iteration >= len(self._record.scales):
            raise ValueError(f"iteration {iteration} isn't being made, {self.finished_iterations()} is")
        if not 0 <= frame < self._record.frames:
            raise ValueError(f"frame {frame} isn't in 0 … {self._record.frames - 1}")
        if image.mode != "RGB" or image.size != (self._frame_size or image.size):
            raise ValueError(f"frame {frame} is {image.mode} of {image.size}, expected RGB of {self._frame_size}")
        path = self.frame_path(iteration, frame)
        _make_folder(path.parent)
        write_atomically(path, _png(image, text))
        self._frame_size = image.size
        self._thumbnails[frame] = self._thumbnail(image)
        return path

    def finish_iteration(self, iteration: int, seconds: Mapping[str, float], split: Sequence[int] = ()) -> None:
        """Record that all frames of the iteration that is being made are written; what `keep` says goes is removed.

        Args:
            iteration: must be `finished_iterations()`.
            seconds: of each stage, by name.
            split: frames of each micro-batch that was drawn.

        Raises:
            RunError: no space is left, or the folder can't be written.
            ValueError: another iteration, or frames are missing.
        """
        frames = range(self._record.frames)
        missing = [frame for frame in frames if frame not in self._thumbnails]
        if iteration != self.finished_iterations() or missing:
            raise ValueError(f"iteration {iteration} can't be finished: frames {missing} are missing")
        self._write_thumbnails(iteration, [self._thumbnails[frame] for frame in frames])
        self._thumbnails.clear()
        done = IterationRecord(self._record.scales[iteration], dict(seconds), split=tuple(split))
        record = self._record.with_iteration(done)
        if self._keep == "last":
            record = record.with_removed(iteration)
        self._write_record(record)
        if self._keep == "last":
            self._remove_pictures(range(iteration))

    def load_iteration(self, iteration: int) -> list[Image.Image]:
        """The N frames of a finished iteration, RGB.

        Raises:
            RunError: a picture doesn't open any more.
            ValueError: the iteration isn't finished, or was removed (the newest never is).
        """
        if iteration >= self.finished_iterations() or self._record.iterations[iteration].removed:
            raise ValueError(f"the pictures of iteration {iteration} aren't there")
        return [_picture(path) for path in self._frame_paths(iteration)]

    def finish(self, seconds: Mapping[str, float], captions: Sequence[str], title: str | None = None) -> None:
        """Write `frames/`, the contact sheet, the GIF, and the end of `story.json`, once all iterations are finished.

        Args:
            seconds: of each stage of this process's part of the run, by name.
            captions: one per frame, shown on the contact sheet where there is room.
            title: of the contact sheet.

        Raises:
            RunError: no space is left, or the folder can't be written.
            ValueError: iterations are missing, or there isn't a caption per frame.
        """
        last = self.finished_iterations() - 1
        if last + 1 != len(self._record.scales) or len(captions) != self._record.frames:
            raise ValueError(
                f"{last + 1} of {len(self._record.scales)} iterations are finished; {len(captions)} captions"
            )
        folder, paths = self.path / "frames", self._frame_paths(last)
        write_atomically(self.path / "story.gif", gif(map(_picture, paths)))
        _make_folder(folder)
        for frame, path in enumerate(paths):
            write_atomically(folder / f"{self._number(frame)}.png", path.read_bytes())
        write_atomically(self.path / "contact-sheet.png", _png(self._sheet(captions, title), {}))
        *earlier, session = self._record.sessions
        sessions = (*earlier, replace(session, seconds=dict(seconds)))
        self._write_record(replace(self._record, sessions=sessions, finished=True))

    def _recover(self, session: Session) -> None:
        """Bring the folder in line with what is finished: after a kill, a full disk, or a picture that was damaged."""
        for folder in [self.path, *(item for item in self.path.iterdir() if _OUR_FOLDER.fullmatch(item.name))]:
            for item in folder.iterdir() if folder.is_dir() else ():
                if is_part(item):
                    item.unlink(missing_ok=True)
        # First what was never finished, which is safe, and makes room on a full disk for what follows.
        self._remove_pictures(range(len(self._record.iterations), len(self._record.scales)))
        count = self._openable_iterations()
        iterations = self._record.iterations[:count]
        sessions = (*self._record.sessions, replace(session, first_iteration=count))
        # The record before the pictures: it must never call something finished that is being removed.
        self._write_record(replace(self._record, iterations=iterations, sessions=sessions, finished=False))
        self._remove_pictures(range(count, len(self._record.scales)))
        self._remove_pictures(index for index, iteration in enumerate(iterations) if iteration.removed)

    def _openable_iterations(self) -> int:
        """How many iterations, from the first on, have everything a resumed run needs."""
        count = 0
        for index, iteration in enumerate(self._record.iterations):
            paths = [] if iteration.removed else self._frame_paths(index)
            damaged = next((path for path in paths if not _opens(path)), None)
            strip = self._strip_path(index)
            if damaged is None and not _opens(strip):
                if iteration.removed:
                    damaged = strip
                else:
                    self._write_thumbnails(index, [self._thumbnail(_picture(path)) for path in paths])
            if damaged is not None:
                self.notices = (f"{damaged} doesn't open: iteration {index} is made again",)
                break
            count = index + 1
        if count and self._record.iterations[count - 1].removed:
            # What the next iteration would read is gone, so there is nothing to go on from.
            removed = ("older iterations were removed (", Field("keep"), " last): all iterations are made again")
            self.notices = (*self.notices, removed)
            return 0
        if count:
            self._frame_size = _picture(self.frame_path(count - 1, 0)).size
        return count

    def _write_record(self, record: RunRecord) -> None:
        write_atomically(self.path / RECORD_NAME, record.to_json())
        self._record = record

    def _write_thumbnails(self, iteration: int, thumbnails: Sequence[Image.Image]) -> None:
        path = self._strip_path(iteration)
        _make_folder(path.parent)
        write_atomically(path, _png(join(thumbnails), {}))

    def _thumbnail(self, image: Image.Image) -> Image.Image:
        return scaled(image, thumbnail_size(image.size, self._record.frames, len(self._record.scales)))

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

    def _sheet(self, captions: Sequence[str], title: str | None) -> Image.Image:
        rows = []
        for index, iteration in enumerate(self._record.iterations):
            # Pillow's font has no λ.
            detail = "text only" if iteration.scale is None else f"scale {iteration.scale:.3g}"
            rows.append(Row(_picture(self._strip_path(index)), f"iteration {index}", detail))
        return contact_sheet(rows, captions, title)

    def _frame_paths(self, iteration: int) -> list[Path]:
        return [self.frame_path(iteration, frame) for frame in range(self._record.frames)]

    def _iteration_path(self, iteration: int) -> Path:
        return self.path / _iteration_name(iteration, len(self._record.scales))

    def _strip_path(self, iteration: int) -> Path:
        return self.path / THUMBNAILS_NAME / f"{_iteration_name(iteration, len(self._record.scales))}.png"

    def _number(self, frame: int) -> str:
        return f"{frame:0{max(3, len(str(self._record.frames - 1)))}d}"


def stored_identity(path: str | Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, so that a resumed run can take over its seed; None if there is no run.

    Raises:
        InputError: the folder is a file, or holds anything but a run.
    """
    path = Path(path)
    _refuse_foreign(path)
    record = path / RECORD_NAME
    return dict(RunRecord.read(record).identity) if record.exists() else None


def _iteration_name(iteration: int, iterations: int) -> str:
    return f"iteration-{iteration:0{max(2, len(str(iterations - 1)))}d}"


def _refuse_foreign(path: Path) -> None:
    """Refuse a folder that holds something, but no run. Writes nothing, so it comes before the lock."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} is a file,", expected="a folder", advice=_ANOTHER_ONE)
    try:
        names = {item.name for item in path.iterdir() if item.name != LOCK_NAME and not is_part(item)}
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}", advice=ANOTHER_FOLDER) from error
    if RECORD_NAME in names:
        RunRecord.read(path / RECORD_NAME)  # a file of that name may be anything
    elif names:
        expected = "a new or empty folder, or a run's"
        raise InputError(f"{path} holds other files ({min(names)}, …),", expected=expected, advice=_ANOTHER_ONE)


def _stored_or_new(path: Path, given: RunRecord, resume: bool) -> RunRecord:
    if not (path / RECORD_NAME).exists():
        return given
    stored = RunRecord.read(path / RECORD_NAME)
    if difference := first_difference(stored.identity, given.identity):
        raise InputError(f"{path} holds another run: ", difference, advice=ANOTHER_FOLDER)
    if (stored.frames, stored.scales) != (given.frames, given.scales):
        raise ValueError("equal identities with other frames or scales: the identity must hold both")
    if resume:
        return stored
    if stored.finished:
        raise InputError(f"{path} already holds this run, finished", advice=(ANOTHER_FOLDER, " to make it again"))
    raise InputError(
        f"{path} already holds this run, with {len(stored.iterations)} of {len(stored.scales)} iterations finished",
        advice=("type ", Field("resume"), " to go on with it, or ", ANOTHER_FOLDER),
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def _png(image: Image.Image, text: Mapping[str, str]) -> bytes:
    info = PngInfo()
    for keyword, value in text.items():
        info.add_text(keyword, value)
    file = BytesIO()
    # Level 1: the levels above take longer and save little on photographs.
    image.save(file, "PNG", compress_level=1, pnginfo=info)
    return file.getvalue()


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        advice = ("type the command again with ", Field("resume"))
        raise RunError(f"{path} doesn't open any more ({error})", advice=advice) from error


def _opens(path: Path) -> bool:
    """Whether a picture is there and whole: the checksum of every part of it is right."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
