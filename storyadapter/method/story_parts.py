"""What a story consists of: frames and characters as they are written, each value checked where it stands."""

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

import pydantic
from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from storyadapter.method.constants import STYLES
from storyadapter.method.errors import Field, InputError
from storyadapter.method.plan import SEED_LIMIT, RunPlan
from storyadapter.method.story_files.document import StoryFile, excerpt, kind
from storyadapter.method.text import normalized, unprintable

MAX_FRAMES: Final = 10_000
MAX_CHARACTERS: Final = 1_000
MAX_NAME: Final = 60  # letters
MAX_REFERENCES: Final = 32  # pictures of one character, or of one frame


class StoryError(InputError, ValueError):
    """A value that no story can have. One from a validator says nothing of its place, which pydantic knows.

    Attributes:
        inside: where in the validated value, if not all of it.
    """

    inside: tuple[Any, ...] = ()


def check_style(style: str) -> str:
    """Return `style` if it is one of `storyadapter.method.constants.STYLES`.

    Raises:
        InputError: it isn't; the text names the closest one and lists all.
    """
    if style not in STYLES:
        raise unknown_name("style", style, STYLES)
    return style


def unknown_name(what: str, found: Any, known: Iterable[str]) -> StoryError:
    known, text = tuple(known), str(found)[:100].lower()
    close = get_close_matches(text, known)
    close.sort(key=lambda name: name[:1] != text[:1])  # the first letter is seldom mistyped
    expected = f"{', '.join(known[:-1])} or {known[-1]}"
    return StoryError(
        f"unknown {what} {excerpt(found)},", expected=expected, advice=f"did you mean {close[0]!r}?" if close else ""
    )


def _printable(value: Any) -> str:
    if not isinstance(value, str | None):
        raise StoryError(f" is {kind(value)},", expected="text", advice="put it in quotes")
    if char := unprintable(value or ""):
        raise StoryError(f" holds {char}, which is no printable character", advice="take it out")
    return (value or "").strip()


def _words(value: Any) -> str:
    words = _printable(value)
    if not words:
        found = " is only white space," if value else " is empty,"
        raise StoryError(found, expected="words", advice="write some, or take it out")
    return words


def _seed(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise StoryError(f" is {kind(value)},", expected="a number from 0 to 2^63 - 1")
    if value is not None and not 0 <= value < SEED_LIMIT:
        raise StoryError(f" is {excerpt(value)},", expected="0 to 2^63 - 1")
    return value


def _control(value: Any, info: ValidationInfo) -> Any:
    """Paths of pictures, those of a story file relative to its folder."""
    paths = value if isinstance(value, list | tuple) else [value]
    if value is None:
        return None
    if not all(isinstance(path, str) and path.strip() for path in paths if path is not None) or not any(paths):
        expected = "the path of a picture, or a list with one per ControlNet, null for none"
        raise StoryError(f" is {kind(value)},", expected=expected)
    folder = Path(info.context.name).parent if isinstance(info.context, StoryFile) else Path()
    return tuple(None if path is None else str(folder / path) for path in paths)


def _reference(value: Any, info: ValidationInfo) -> Any:
    """A path of a picture, of a story file's from its folder on."""
    path = os.path.expanduser(_words(value))
    return str(Path(info.context.name).parent.absolute() / path) if isinstance(info.context, StoryFile) else path


def _frame(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value if isinstance(value, Frame) else {"prompt": value}
    if "prompt" not in value:
        expected = "text, or a mapping with 'prompt' and, if wanted, 'negative', 'seed', 'control' and 'references'"
        raise StoryError(" is a mapping,", expected=expected, advice="put text that holds ': ' in quotes")
    return {str(key): item for key, item in value.items()}


def _character(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value if isinstance(value, Character) else {"definition": value}
    if not value:
        raise StoryError(" is an empty mapping,", expected="'definition', 'references', or both")
    return {str(key): item for key, item in value.items()}


def _references(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise StoryError(f" is {kind(value)},", expected="a list with one file per picture")
    if len(value) > MAX_REFERENCES:
        raise StoryError(f" has {len(value):,} pictures,", expected=f"{MAX_REFERENCES} at the most")
    return value


def checked_frames(value: Any) -> Any:
    if not isinstance(value, list | tuple | None):
        raise StoryError(f" is {kind(value)},", expected="a list with one text per frame")
    if not value:
        advice = ("type ", Field("prompt"), " TEXT once per frame, or list them in the story file")
        raise StoryError("the story is empty,", expected="one prompt per frame", advice=advice)
    if len(value) > MAX_FRAMES:
        raise StoryError(f"the story has {len(value):,} prompts,", expected=f"{MAX_FRAMES:,} at the most")
    return value


def checked_characters(value: Any) -> Any:
    if not isinstance(value, Mapping | None):
        raise StoryError(f" is {kind(value)},", expected="a mapping of names to definitions")
    if len(value or ()) > MAX_CHARACTERS:
        raise StoryError(f" has {len(value or ()):,} names,", expected=f"{MAX_CHARACTERS:,} at the most")
    seen = set()
    for name in value or ():
        stripped, error = normalized(str(name).strip()), None
        if stripped in seen:
            error = StoryError(f"the character {excerpt(stripped)} is defined twice,", expected="once")
        elif len(stripped) > MAX_NAME:  # each letter of a prompt may begin one
            found = f"the character {excerpt(stripped)} has a name of {len(stripped)} letters,"
            error = StoryError(found, expected=f"{MAX_NAME} at the most")
        if error:
            error.inside = (name,)
            raise error
        seen.add(stripped)
    return value or {}


Words = Annotated[str, pydantic.Field(min_length=1), BeforeValidator(_words)]
StyleName = Annotated[Words, AfterValidator(check_style), pydantic.Field(json_schema_extra={"enum": [*STYLES]})]
_Printable = Annotated[str, BeforeValidator(_printable)]
_Control = Annotated[
    tuple[str | None, ...], BeforeValidator(_control, json_schema_input_type=Words | list[Words | None])
]
_Reference = Annotated[str, pydantic.Field(min_length=1), BeforeValidator(_reference)]
_References = Annotated[tuple[_Reference, ...], BeforeValidator(_references), pydantic.Field(max_length=MAX_REFERENCES)]
_Seed = Annotated[int, pydantic.Field(ge=0, lt=SEED_LIMIT), BeforeValidator(_seed)]


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid", "use_attribute_docstrings": True})
class Frame:
    """A frame of a story as it is written, with what is its own."""

    prompt: Words
    """What the frame shows; names of characters in it are replaced by their definitions."""
    negative: _Printable | None = None
    """What it must not show, in place of the whole story's negative prompt; may be empty."""
    seed: _Seed | None = None
    """Of this frame's noise, in place of the whole story's."""
    control: _Control | None = None
    """A picture for the ControlNet, such as a pose; with several of them a list with one for each, null for none."""
    references: _References = ()
    """Files of pictures that this frame attends to, beside those of the characters that its prompt names."""

    def negative_prompt(self, plan: RunPlan) -> str:
        """Its own, or that of the whole story."""
        return plan.negative_prompt if self.negative is None else self.negative

    def to_dict(self) -> str | dict[str, Any]:
        """As in a story file."""
        paths = self.control
        control = None if paths is None else paths[0] if len(paths) == 1 else [*paths]
        own: dict[str, Any] = {"negative": self.negative, "seed": self.seed, "control": control}
        own["references"] = list(self.references) or None
        own = {key: value for key, value in own.items() if value is not None}
        return {"prompt": self.prompt, **own} if own else self.prompt


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid", "use_attribute_docstrings": True})
class Character:
    """A character of a story, by its name."""

    definition: Words | None = None
    """What takes the name's place in every prompt; without one, the name stays."""
    references: _References = ()
    """Files of pictures of the character: frames whose prompt names it attend to them."""

    def to_dict(self) -> str | dict[str, Any]:
        """As in a story file."""
        if not self.references:
            return self.definition or ""
        named = {"definition": self.definition} if self.definition else {}
        return {**named, "references": list(self.references)}


GivenCharacter = Annotated[Character, BeforeValidator(_character, json_schema_input_type=Words | Character)]
GivenFrame = Annotated[Frame, BeforeValidator(_frame, json_schema_input_type=Words | Frame)]
