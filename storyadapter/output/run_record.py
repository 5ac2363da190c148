"""`story.json`: what a run is, how far it has come, and what it took."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from storyadapter.method.errors import Field, InputError, Text, can_not_be_read
from storyadapter.output.files import ANOTHER_FOLDER, LOCK_NAME, is_part
from storyadapter.output.frame_files import iteration_name, numbered

FORMAT = "storyadapter-trt run"
SCHEMA = 4
RECORD_NAME = "story.json"

_ANOTHER_ONE = ("choose another one with ", Field("out"))
_ABSENT = object()
_READING = ConfigDict(extra="forbid")
_MAX_BYTES = 64 << 20  # a story of 10,000 frames and 50 iterations stays below
_EXCERPT = 40  # letters of a value shown in a message


@dataclass(frozen=True)
class IterationRecord:
    """An iteration whose frames are all written."""

    __pydantic_config__ = _READING
    scale: float | None  # λ of its references; None for the text-only iteration
    seconds: Mapping[str, float]  # of each stage, by name
    removed: bool = False  # whether its pictures were removed when the next iteration was finished (`keep="last"`)
    split: tuple[PositiveInt, ...] = ()  # frames of each batch that was drawn
    sha256: tuple[str, ...] = ()  # of each frame's file
    thumbnails_sha256: str = ""  # of the row of the contact sheet
    decoded_again: tuple[NonNegativeInt, ...] = ()  # frames decoded in fp32, as the VAE's own values weren't finite


@dataclass(frozen=True)
class UnderWay:
    """The iteration that is being drawn, and in batches of how many frames: a resumed run keeps to these."""

    __pydantic_config__ = _READING
    iteration: int
    split: tuple[PositiveInt, ...]


@dataclass(frozen=True)
class Session:
    """One process's part of a run: a run that was resumed has several."""

    __pydantic_config__ = _READING
    first_iteration: int  # the first one this process worked on
    details: Mapping[str, Any]  # what doesn't decide the pictures: versions, device, split into micro-batches, …
    # of each stage in this process, by name; written when the run is finished
    seconds: Mapping[str, float] = field(default_factory=dict)
    # those before the first step, from when the process began, by what was done in them, in order; written likewise
    start: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EditRecord:
    """Frames of a finished run that were drawn again, in every iteration, beside all others as they were."""

    __pydantic_config__ = _READING
    frames: tuple[NonNegativeInt, ...]  # that were drawn again
    older: tuple[NonNegativeInt, ...]  # those that stayed: they never attended to the new ones
    before: tuple[Any, ...]  # what the story said of `frames`, as in a story file
    kept: str | None = None  # the folder in which the frames lie as they were, below that of the run


@dataclass(frozen=True)
class RunRecord:
    """The content of `story.json`."""

    __pydantic_config__ = _READING
    identity: Mapping[str, Any]  # everything that decides the pictures, as JSON values
    frames: int  # N, the frames of one iteration
    scales: tuple[float | None, ...]  # λ of every iteration planned, None first
    iterations: tuple[IterationRecord, ...] = ()  # those that are finished, in order
    sessions: tuple[Session, ...] = ()  # the processes that worked on the run, in order
    finished: bool = False  # whether everything is written, the overview too
    under_way: UnderWay | None = None  # the iteration that is being drawn, if one was begun
    edits: tuple[EditRecord, ...] = ()  # in order; the last one may be under way
    before: tuple[IterationRecord, ...] = ()  # the iterations as they were, while an edit is under way

    @property
    def stays(self) -> frozenset[int]:
        """The frames that the last edit leaves as they are."""
        return frozenset(self.edits[-1].older) if self.edits else frozenset()

    def to_json(self) -> bytes:
        """The text of `story.json`: UTF-8, keys sorted, two spaces of indentation."""
        value = {
            "format": FORMAT,
            "schema": SCHEMA,
            "identity": self.identity,
            "progress": {
                "status": "finished" if self.finished else "running",
                "frames": self.frames,
                "scales": self.scales,
                "iterations": [asdict(iteration) for iteration in self.iterations],
                "under_way": asdict(self.under_way) if self.under_way else None,
                "before": [asdict(iteration) for iteration in self.before],
            },
            "edits": [asdict(edit) for edit in self.edits],
            "sessions": [asdict(session) for session in self.sessions],
        }
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        # Halves of surrogate pairs, as in paths that aren't UTF-8, become JSON's own escapes.
        return text.encode(errors="backslashreplace")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `story.json`.

        Raises:
            InputError: it can't be read, or wasn't written by this program, or by another version of it.
        """

        def refusal(found: str, expected: str = "the record of a storyadapter-trt run") -> InputError:
            return InputError(f"{path} {found}", expected=expected, advice=ANOTHER_FOLDER, field="out")

        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise refusal(f"is longer than {_MAX_BYTES >> 20} MiB,")
            value = json.loads(data, parse_constant=_refuse_constant)
        except OSError as error:
            raise refusal(f"can't be read: {error.strerror}") from error
        except (ValueError, RecursionError):
            raise refusal("is no valid JSON,") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise refusal("is something else,")
        if value.get("schema") != SCHEMA:
            expected = f"{SCHEMA}: another version of storyadapter-trt wrote it"
            raise refusal(f"has schema {value.get('schema')!r},", expected)
        try:
            progress = dict(value["progress"])
            progress["finished"] = progress.pop("status") == "finished"
            found = {name: value[name] for name in ("identity", "sessions", "edits") if name in value}
            return TypeAdapter(cls).validate_python({**found, **progress})
        except (KeyError, TypeError, ValueError) as error:
            raise refusal(f"is damaged ({_first_fault(error)}),") from None

    def with_iteration(self, iteration: IterationRecord) -> Self:
        """The record after one more iteration is finished."""
        return replace(self, iterations=(*self.iterations, iteration))

    def with_removed(self, count: int) -> Self:
        """The record after the pictures of the first `count` iterations are removed."""
        removed = (replace(iteration, removed=True) for iteration in self.iterations[:count])
        return replace(self, iterations=(*removed, *self.iterations[count:]))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _first_fault(error: Exception) -> str:
    """What is wrong, and where, of an error of reading."""
    if not isinstance(error, ValidationError):
        return repr(error)
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


def stored_identity(path: str | Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, so that a resumed run can take over its seed; None if there is no run.

    Raises:
        InputError: the folder is a file, or holds anything but a run.
    """
    path = Path(path)
    refuse_foreign(path)
    record = path / RECORD_NAME
    return dict(RunRecord.read(record).identity) if record.exists() else None


def refuse_foreign(path: Path) -> None:
    """Refuse a folder that holds something, but no run. Writes nothing, so it comes before the lock."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # such as for want of permission; ValueError: a null byte
        raise InputError(can_not_be_read(path, error), advice=ANOTHER_FOLDER) from error
    if not path.is_dir():
        raise InputError(f"{path} is a file,", expected="a folder", advice=_ANOTHER_ONE)
    try:
        names = {item.name for item in path.iterdir() if item.name != LOCK_NAME and not is_part(item)}
    except OSError as error:
        raise InputError(can_not_be_read(path, error), advice=ANOTHER_FOLDER) from error
    if RECORD_NAME in names:
        RunRecord.read(path / RECORD_NAME)  # a file of that name may be anything
    elif names:
        expected = "a new or empty folder, or a run's"
        raise InputError(f"{path} holds other files ({min(names)}, …),", expected=expected, advice=_ANOTHER_ONE)


def refuse_another(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError where two identities differ."""
    if difference := first_difference(stored, given):
        raise InputError(f"{path} holds another run: ", difference, advice=ANOTHER_FOLDER)


def stored_or_new(path: Path, given: RunRecord, resume: bool, edited: bool = False) -> RunRecord:
    if not (path / RECORD_NAME).exists():
        return given
    stored = RunRecord.read(path / RECORD_NAME)
    if stored.edits and not edited:
        frames = ", ".join(map(str, stored.edits[-1].frames))
        raise InputError(f"{path} holds a story that was edited (frame {frames})", advice=ANOTHER_FOLDER)
    grown = resume and _goes_on(stored, given)
    if not grown:
        refuse_another(path, stored.identity, given.identity)
        if (stored.frames, stored.scales) != (given.frames, given.scales):
            found = f"{path / RECORD_NAME} is damaged: its frames and scales aren't those of its own settings"
            raise InputError(found, advice=ANOTHER_FOLDER, field="out")
    if grown:
        # with more frames, all iterations are another story's; what of them is the same is found by its jobs
        iterations = stored.iterations if stored.frames == given.frames else ()
        return replace(given, iterations=iterations, sessions=stored.sessions)
    if resume:
        return stored
    if stored.finished:
        raise InputError(f"{path} already holds this run, finished", advice=(ANOTHER_FOLDER, " to make it again"))
    raise InputError(
        f"{path} already holds this run, with {len(stored.iterations)} of {len(stored.scales)} iterations finished",
        advice=("type ", Field("resume"), " to go on with it, or ", ANOTHER_FOLDER),
    )


def _goes_on(stored: RunRecord, given: RunRecord) -> bool:
    """Whether a run is the stored one with more iterations, or with more frames at the end; its files are then named
    as before."""

    def cut(identity: Mapping[str, Any]) -> tuple[list[Any], list[Any], Any]:
        """Frames, each with its pictures; scales; and all else."""
        rest = json_values(dict(identity))
        try:
            prompts, scales = rest["story"].pop("prompts"), rest["plan"].pop("scales")
            given = [rest.pop(name, None) or [None] * len(prompts) for name in ("references", "control")]
            return [*zip(prompts, *given, strict=True)], list(scales), rest
        except (AttributeError, KeyError, TypeError, ValueError):
            return [], [], None

    (before, scales, rest), (after, more, same) = cut(stored.identity), cut(given.identity)
    names = [(numbered(0, run.frames), iteration_name(0, len(run.scales))) for run in (stored, given)]
    is_longer = len(after) > len(before) > 0 or len(more) > len(scales)
    begins_so = after[: len(before)] == before and more[: len(scales)] == scales
    return is_longer and begins_so and rest == same is not None and names[0] == names[1]


def json_values(value: Any) -> Any:
    """`value` as it reads back from JSON: tuples are lists, keys strings. Raises: TypeError, ValueError, as `json`."""
    return json.loads(json.dumps(value, allow_nan=False))


def first_difference(stored: Any, given: Any, place: tuple[str | int, ...] = ()) -> Text | None:
    """The first place where two identities differ, in words and in the order of `given`; None if they are equal.

    The items of an identity's "plan" are told as the settings that they are.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*given, *(key for key in stored if key not in given)]:
            if found := first_difference(stored.get(key, _ABSENT), given.get(key, _ABSENT), (*place, key)):
                return found
        return None
    if isinstance(stored, list) and isinstance(given, list):
        if len(stored) != len(given):
            return (_named(place), f" has {len(stored)} items there, {len(given)} here")
        for index, pair in enumerate(zip(stored, given, strict=True)):
            if found := first_difference(*pair, (*place, index)):
                return found
        return None
    if stored == given and isinstance(stored, bool) == isinstance(given, bool):
        return None
    start = 0
    if isinstance(stored, str) and isinstance(given, str):
        same = next(
            (i for i, (a, b) in enumerate(zip(stored, given, strict=False)) if a != b), min(len(stored), len(given))
        )
        start = max(0, same - _EXCERPT // 2)
    return (_named(place), f" is {_excerpt(stored, start)} there, {_excerpt(given, start)} here")


def _named(place: Sequence[str | int]) -> Text:
    """("story", "prompts", 1) → "story.prompts[1]"; ("plan", "steps") → (Field("steps"), "")."""
    named: Text = ()
    match place:
        case ("plan", "scales", *place):
            named = (Field("scales"), " (or ", Field("iterations"), ")")
        case ("plan", "controls", *place):
            named = Field("controlnet")
        case ("plan", str(setting), *place):
            named = Field(setting)
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return (named, text) if named else text.removeprefix(".")


def _excerpt(value: Any, start: int) -> str:
    if value is _ABSENT:
        return "not given"
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"
    before = "…" if start else ""
    after = "…" if len(value) > start + _EXCERPT else ""
    return repr(before + value[start : start + _EXCERPT] + after)
