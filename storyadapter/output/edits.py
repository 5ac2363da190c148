"""Some frames of a finished run, drawn again: in a copy of its folder, or in place with the old ones kept."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import pydantic

from storyadapter.method.errors import Field, InputError
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.output.files import (
    ANOTHER_FOLDER,
    LOCK_NAME,
    is_part,
    lock_folder,
    sha256,
    write_atomically,
    write_error,
)
from storyadapter.output.frame_files import frame_path
from storyadapter.output.overview import THUMBNAILS_NAME, ThumbnailStrips
from storyadapter.output.run_record import RECORD_NAME, EditRecord, RunRecord, json_values, refuse_foreign

_KEPT: Final = "before-edit-{:02d}"
_COPIED: Final = ("iteration-*", THUMBNAILS_NAME)


@dataclass(frozen=True)
class StoredRun:
    """A run folder's record, and what of it a program needs that draws more of it.

    Attributes:
        folder: of the run.
        record: as it is stored.
        story, style, plan: that were drawn; `plan` with everything decided.
    """

    folder: Path
    record: RunRecord
    story: Story
    style: str | None
    plan: RunPlan

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises InputError: the folder isn't there, holds no run, or one whose story or plan can't be read."""
        path = folder / RECORD_NAME
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder,", expected="the output folder of a finished run")
        record = RunRecord.read(path)
        try:
            story = pydantic.TypeAdapter(Story).validate_python(record.identity["story"])
            plan, style = RunPlan.from_dict(record.identity["plan"]), record.identity["style"]
            if "control" in record.identity:
                story = story.with_control(_last(record, "control_pictures"))
        except (InputError, pydantic.ValidationError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no story that can be drawn: {str(error).splitlines()[0]}") from None
        if len(story.frames) != record.frames or plan.iterations != len(record.scales):
            raise InputError(f"{path} is damaged: its frames and scales aren't those of its own settings")
        return cls(folder, record, story, style, plan)

    @property
    def keep(self) -> Literal["all", "last"]:
        """Frames of "all" iterations, or of the "last" alone."""
        return (
            "last" if any(iteration.removed for iteration in (self.record.before or self.record.iterations)) else "all"
        )


def _last(record: RunRecord, detail: str) -> Any:
    """What the last process said of something that worked on a run and said it. Raises LookupError: none did."""
    return [session.details[detail] for session in record.sessions if detail in session.details][-1]


@dataclass(frozen=True)
class Edit:
    """Frames of a finished run that are to be drawn again.

    Attributes:
        run: as it was.
        story: as it is to be.
        frames: that are drawn again, in every iteration; all others stay as they are.
        follows: whether the others follow: then every iteration after the first is drawn again whole, as if the story
            had been written so.
    """

    run: StoredRun
    story: Story
    frames: tuple[int, ...]
    follows: bool = False

    @classmethod
    def of(cls, folder: Path, changes: Mapping[int, Mapping[str, Any]], *, follows: bool = False) -> Self:
        """Changes of a run's story, as `Story.edited` takes them.

        Raises:
            InputError: the folder holds no finished run, or one that isn't whole; there is no such frame; nothing is to
                be drawn again; or a value that no frame can have.
        """
        run = StoredRun.read(folder)
        if not run.record.finished:
            raise InputError(f"{folder} holds a run that isn't finished", advice=("go on with it by ", Field("resume")))
        edit = cls(run, run.story.edited(changes), tuple(sorted(changes)), follows)
        other = edit.story != run.story  # of pictures that are keyed beside it, the same path may hold another
        other |= "control" in run.record.identity and any("control" in values for values in changes.values())
        if not other and not (run.record.edits and set(run.record.edits[-1].frames) - set(edit.frames)):
            found = f"frame {', '.join(map(str, edit.frames))} would be drawn as it is"
            expected = (
                "another ",
                Field("prompt"),
                ", ",
                Field("negative"),
                ", ",
                Field("seed"),
                " or ",
                Field("control"),
            )
            raise InputError(found, expected=expected)
        edit._refuse_damage()
        return edit

    def identity(
        self, references: Sequence[Sequence[str]] | None = None, control: Sequence[Sequence[str | None]] | None = None
    ) -> dict[str, Any]:
        """Of the run that it becomes.

        Args:
            references: for each frame of the new story the keys of a user's pictures; None where it has none.
            control: the same of control pictures; None also where the story's names of them are their keys.
        """
        story = self.story if control is None else self.story.without_control()
        named = {**self.run.record.identity, "story": json_values(story.to_dict())}
        if "references" in named:
            named["references"] = self._merged(named["references"], references)
        if pictures := self._merged(named.pop("control", None), control):
            named["control"] = pictures
        return named

    def _merged(self, before: Sequence[Any] | None, now: Sequence[Any] | None) -> list[list[Any]] | None:
        """Keys of pictures, of frames that are drawn again the new ones; None where there are none at all."""
        count = len(self.story.frames)
        before, now = before or [[]] * count, now or [[]] * count
        drawn = range(count) if self.follows else self.frames
        keys = [list(now[n] if n in drawn else before[n]) for n in range(count)]
        return keys if any(keys) else None

    def check(self, out: Path | None) -> None:
        """Raises InputError: `begin` would refuse this folder."""
        if out is not None:
            refuse_foreign(out)
            if (out / RECORD_NAME).exists():
                raise InputError(f"{out} already holds a run", advice=ANOTHER_FOLDER)

    def begin(self, identity: Mapping[str, Any], out: Path | None = None) -> Path:
        """Make a folder that `RunFolder.open` goes on with, given this identity, `resume` and `edited`.

        Args:
            identity: see `identity`.
            out: a new folder; None: in place, with the old frames copied to `before-edit-01`.

        Returns:
            The folder.

        Raises:
            InputError: the folder is in use, or holds something.
            RunError: no space is left.
        """
        self.check(out)
        if out is None:
            lock = lock_folder(self.run.folder)
            try:
                kept = self._keep_old_frames()
                write_atomically(self.run.folder / RECORD_NAME, self._record(identity, kept).to_json())
            finally:
                lock.release()
            return self.run.folder
        part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            for pattern in _COPIED:
                for folder in self.run.folder.glob(pattern):
                    shutil.copytree(folder, part / folder.name)
            write_atomically(part / RECORD_NAME, self._record(identity, None).to_json())
            if out.is_dir():  # empty but for what other processes left
                for item in out.iterdir():
                    if item.name == LOCK_NAME or is_part(item):
                        item.unlink()
            part.rename(out)
        except OSError as error:
            raise write_error(out, error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return out

    def _record(self, identity: Mapping[str, Any], kept: str | None) -> RunRecord:
        before = self.run.record
        record = replace(before, identity=json_values(dict(identity)), iterations=(), finished=False, under_way=None)
        if self.follows:
            return replace(record, edits=())
        said = tuple(self.run.story.frames[frame].to_dict() for frame in self.frames)
        older = tuple(frame for frame in range(before.frames) if frame not in self.frames)
        edit = EditRecord(self.frames, older, said, kept)
        return replace(record, edits=(*before.edits, edit), before=before.iterations)

    def _keep_old_frames(self) -> str:
        """Copy what will be replaced; returns the folder's name."""
        record, folder = self.run.record, self.run.folder
        number = next(n for n in range(1, 10_000) if not (folder / _KEPT.format(n)).exists())
        kept = folder / _KEPT.format(number)
        counts = {"iterations": len(record.scales), "frames": record.frames}
        try:
            for iteration, done in enumerate(record.iterations):
                frames = range(record.frames) if self.follows and iteration else self.frames
                for frame in () if done.removed else frames:
                    path = frame_path(kept, iteration, frame, **counts)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(frame_path(folder, iteration, frame, **counts), path)
        except OSError as error:
            raise write_error(kept, error) from error
        return kept.name

    def _refuse_damage(self) -> None:
        record, folder = self.run.record, self.run.folder
        counts = {"iterations": len(record.scales), "frames": record.frames}
        strips = ThumbnailStrips(folder / THUMBNAILS_NAME, record.frames, len(record.scales))
        for iteration, done in enumerate(record.iterations):
            written = {strips.path(iteration): done.thumbnails_sha256}
            if not done.removed:
                written |= {frame_path(folder, iteration, n, **counts): hash for n, hash in enumerate(done.sha256)}
            for path, expected in written.items():
                if sha256(path) != expected:
                    advice = ("put it back, or draw the run again with ", Field("resume"))
                    raise InputError(f"{path} isn't what was written", advice=advice, field="out")
