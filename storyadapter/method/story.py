"""A story: its prompts, title, style and characters, from Python or from a YAML, JSON or text file."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, ModelWrapValidatorHandler, ValidationInfo
from pydantic_core import ErrorDetails

from storyadapter.method.constants import STYLES
from storyadapter.method.errors import Field, InputError, spelled
from storyadapter.method.story_file import STORY_SUFFIXES, StoryFile, kind, read_story_file

_PATH = re.compile(r"\S*/\S*|\S+\.[A-Za-z]\w{0,4}")


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
        raise _unknown("style", style, STYLES)
    return style


def _unknown(what: str, found: Any, known: Iterable[str]) -> StoryError:
    known, text = tuple(known), str(found).lower()
    close = get_close_matches(text, known)
    close.sort(key=lambda name: name[:1] != text[:1])  # the first letter is seldom mistyped
    expected = f"{', '.join(known[:-1])} or {known[-1]}"
    return StoryError(
        f"unknown {what} {found!r},", expected=expected, advice=f"did you mean {close[0]!r}?" if close else ""
    )


def _words(value: Any) -> str:
    if not isinstance(value, str | None):
        raise StoryError(f" is {kind(value)},", expected="text", advice="put it in quotes")
    for char in value or "":
        # Control characters and halves of surrogate pairs: neither a tokenizer nor a picture's text can hold them.
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r":
            raise StoryError(f" holds U+{ord(char):04X}, which is no printable character", advice="take it out")
    if not value or not value.strip():
        found = " is only white space," if value else " is empty,"
        raise StoryError(found, expected="words", advice="write some, or take it out")
    return value.strip()


def _prompts(value: Any) -> Any:
    if not isinstance(value, list | tuple | None):
        raise StoryError(f" is {kind(value)},", expected="a list with one text per frame")
    if not value:
        advice = ("type ", Field("prompt"), " TEXT once per frame, or list them in the story file")
        raise StoryError("the story is empty,", expected="one prompt per frame", advice=advice)
    return value


def _characters(value: Any) -> Any:
    if not isinstance(value, Mapping | None):
        raise StoryError(f" is {kind(value)},", expected="a mapping of names to definitions")
    seen = set()
    for name in value or ():
        if (stripped := str(name).strip()) in seen:
            error = StoryError(f"the character {stripped!r} is defined twice,", expected="once")
            error.inside = (name,)
            raise error
        seen.add(stripped)
    return value or {}


Words = Annotated[str, BeforeValidator(_words)]


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class Story:
    """One picture per prompt, in story order; also the schema of a story file.

    White space at the ends of prompts, names, definitions and the title is dropped.

    Attributes:
        prompts: one per frame, at least one.
        title: shown on the contact sheet; no part of any prompt.
        style: a name of `storyadapter.method.constants.STYLES`, or None if the story doesn't say.
        characters: name -> definition, which takes the name's place in every prompt.

    Raises:
        InputError: no prompt; a value that isn't text, is blank, or holds characters that can't be printed; an unknown
            style.
    """

    prompts: Annotated[tuple[Words, ...], BeforeValidator(_prompts), pydantic.Field(validate_default=True)] = ()
    title: Words | None = None
    style: Annotated[Words, AfterValidator(check_style)] | None = None
    # A dict has no hash; equal stories have equal hashes without it too.
    characters: Annotated[dict[Words, Words], BeforeValidator(_characters)] = field(default_factory=dict, hash=False)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _told(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return handler(value)
        except pydantic.ValidationError as error:
            raise _refusal(error.errors(include_url=False), info.context) from None

    @classmethod
    def from_prompts(cls, prompts: Iterable[str]) -> Self:
        """A story of bare prompts. Raises: InputError, as for the class."""
        return cls(prompts if isinstance(prompts, str) else tuple(prompts))  # type: ignore[arg-type]  # text is refused

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a story file: `.yaml`/`.yml`, `.json`, or plain text under any other name, in UTF-8.

        YAML and JSON hold a mapping: `prompts` (a list of strings) and, if wanted, `title`, `style` and `characters`
        (name: definition). Plain text holds a prompt per line; blank lines are skipped; there are no comments.

        Raises:
            InputError: the file is missing, isn't UTF-8 or isn't a story; the text names the file and the line, for
                JSON the key.
        """
        file = read_story_file(Path(path))
        return pydantic.TypeAdapter(cls).validate_python(file.fields, context=file)

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Self:
        """Read the published scripts' stories: one argument that is an existing path, whose name ends in .yaml, .yml,
        .json or .txt, or that is a path by its looks (tales/fox, tale.yml2), is a story file; anything else is the
        prompts.

        Raises:
            InputError: as `from_file` and the class.
        """
        if len(arguments) == 1:
            (argument,) = arguments
            is_file = argument.lower().endswith(STORY_SUFFIXES) or os.path.exists(argument)
            if is_file or _PATH.fullmatch(argument):
                return cls.from_file(argument)
        return cls.from_prompts(arguments)

    def final_prompts(self, style: str | None = None) -> tuple[str, ...]:
        """What the text encoders get for each frame: characters' names replaced, then the style's text around it.

        A name is replaced where it stands as a whole word, in the same case; of two names that fit, by the longer one;
        names inside a definition stay.

        Args:
            style: overrides the story's own; where neither says, the prompt stands alone (style "none").

        Raises:
            InputError: `style` is unknown.
        """
        before, after = STYLES[check_style(style or self.style or "none")]
        return tuple(before + self._with_definitions(prompt) + after for prompt in self.prompts)

    def to_dict(self) -> dict[str, Any]:
        """The story as JSON values, under the keys of a story file. Equal stories give equal values."""
        return {
            "title": self.title,
            "style": self.style,
            "characters": dict(sorted(self.characters.items())),
            "prompts": list(self.prompts),
        }

    def _with_definitions(self, prompt: str) -> str:
        if not self.characters:
            return prompt
        names = sorted(self.characters, key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)"
        return re.sub(pattern, lambda match: self.characters[match[0]], prompt)


def _refusal(wrong: list[ErrorDetails], file: StoryFile | None) -> InputError:
    """The first of the things that pydantic found wrong, but an unknown key first, in words and with its line."""
    unknown = "unexpected_keyword_argument"
    first = min(wrong, key=lambda details: details["type"] != unknown)
    names, (top, *below) = [field.name for field in fields(Story)], first["loc"]
    is_key = below[-1:] == ["[key]"]
    # An argument is told by its position, a bad key by its repr.
    place = (names[top] if isinstance(top, int) else top, *([first["input"]] if is_key else below))
    match place:
        case "prompts", int(index):
            what = f"prompt {index + 1}"
        case "characters", name:
            what = "a character's name" if is_key else f"the definition of the character {str(name).strip()!r}"
        case "title" | "style" as name, *_:
            what = f"the {name}"
        case _:
            what = f"'{place[0]}'"
    is_unknown = first["type"] == unknown
    error = _unknown("key", place[0], (*names[1:], names[0])) if is_unknown else first["ctx"]["error"]
    found = (what if error.text().startswith(" ") else "") + spelled(error.args)
    where = file.where(*place, *error.inside) if file else ""
    return InputError(where + found, expected=error.expected, advice=error.advice, field=".".join(map(str, place)))
