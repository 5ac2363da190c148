"""A story: its prompts, title, style and characters, from Python or from a file."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, ModelWrapValidatorHandler, ValidationInfo
from pydantic_core import ErrorDetails

from storyadapter.method.constants import STYLES
from storyadapter.method.errors import Field, InputError, Text, spelled
from storyadapter.method.plan import SEED_LIMIT, RunPlan
from storyadapter.method.story_files.document import StoryFile, excerpt, kind
from storyadapter.method.story_files.reading import STANDARD_INPUT, STORY_SUFFIXES, read_story_file
from storyadapter.method.text import NameFinder, normalized, unprintable

MAX_FRAMES: Final = 10_000
MAX_CHARACTERS: Final = 1_000
MAX_NAME: Final = 60  # letters

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


def _frame(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value if isinstance(value, Frame) else {"prompt": value}
    if "prompt" not in value:
        expected = "text, or a mapping with 'prompt' and, if wanted, 'negative', 'seed' and 'control'"
        raise StoryError(" is a mapping,", expected=expected, advice="put text that holds ': ' in quotes")
    return {str(key): item for key, item in value.items()}


def _frames(value: Any) -> Any:
    if not isinstance(value, list | tuple | None):
        raise StoryError(f" is {kind(value)},", expected="a list with one text per frame")
    if not value:
        advice = ("type ", Field("prompt"), " TEXT once per frame, or list them in the story file")
        raise StoryError("the story is empty,", expected="one prompt per frame", advice=advice)
    if len(value) > MAX_FRAMES:
        raise StoryError(f"the story has {len(value):,} prompts,", expected=f"{MAX_FRAMES:,} at the most")
    return value


def _characters(value: Any) -> Any:
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
_Style = Annotated[Words, AfterValidator(check_style), pydantic.Field(json_schema_extra={"enum": [*STYLES]})]
_Printable = Annotated[str, BeforeValidator(_printable)]
_Control = Annotated[
    tuple[str | None, ...], BeforeValidator(_control, json_schema_input_type=Words | list[Words | None])
]
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

    def negative_prompt(self, plan: RunPlan) -> str:
        """Its own, or that of the whole story."""
        return plan.negative_prompt if self.negative is None else self.negative

    def to_dict(self) -> str | dict[str, Any]:
        """As in a story file."""
        paths = self.control
        control = None if paths is None else paths[0] if len(paths) == 1 else [*paths]
        values: dict[str, Any] = {"negative": self.negative, "seed": self.seed, "control": control}
        own = {key: value for key, value in values.items() if value is not None}
        return {"prompt": self.prompt, **own} if own else self.prompt


_GivenFrame = Annotated[Frame, BeforeValidator(_frame, json_schema_input_type=Words | Frame)]


@dataclass(frozen=True)
class FinalFrame:
    """All texts and numbers of a frame that decide its pixels beside the plan; `negative_prompt`: None if unguided."""

    prompt: str
    negative_prompt: str | None
    seed: int


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class Story:
    """One picture per prompt, in story order; also the schema of a story file.

    White space at the ends of prompts, names, definitions and the title is dropped.

    Attributes:
        frames: one per picture, at least one; given as `prompts`, each a text or a mapping with `prompt` and, if
            wanted, `negative`, `seed` and `control`.
        title: shown on the contact sheet; no part of any prompt.
        style: a name of `storyadapter.method.constants.STYLES`, or None if the story doesn't say.
        characters: name -> definition, which takes the name's place in every prompt.

    Raises:
        InputError: no prompt; a value that isn't text, is blank, or holds characters that can't be printed; an unknown
            style or key; a seed out of range; more than 10,000 prompts or 1,000 characters.
    """

    frames: Annotated[tuple[_GivenFrame, ...], BeforeValidator(_frames)] = pydantic.Field(
        default=(), alias="prompts", validate_default=True, min_length=1, max_length=MAX_FRAMES
    )
    title: Words | None = None
    style: _Style | None = None
    # A dict has no hash; equal stories have equal hashes without it too.
    characters: Annotated[dict[Words, Words], BeforeValidator(_characters)] = field(default_factory=dict, hash=False)

    if TYPE_CHECKING:  # what is given, before it is validated

        def __init__(
            self,
            prompts: Sequence[str | Frame | Mapping[str, Any]] = (),
            title: str | None = None,
            style: str | None = None,
            characters: Mapping[str, str] | None = None,
        ) -> None: ...

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _told(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return handler(value)
        except pydantic.ValidationError as error:
            raise _refusal(error.errors(include_url=False), info.context) from None

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per frame, as written."""
        return tuple(frame.prompt for frame in self.frames)

    @classmethod
    def from_prompts(cls, prompts: Iterable[str]) -> Self:
        """A story of bare prompts. Raises: InputError, as for the class."""
        return cls(prompts if isinstance(prompts, str) else tuple(prompts))  # text is refused

    @classmethod
    def from_file(
        cls, path: str | Path, *, language: str = "en", on_notice: Callable[[Text], None] = lambda notice: None
    ) -> Self:
        """Read a story file in UTF-8, or a story folder of ViStoryBench; "-" is standard input.

        - `.yaml`, `.yml`, `.json`: a mapping with `prompts` (a list of texts, or of mappings with `prompt`, `negative`,
          `seed` and `control`) and, if wanted, `title`, `style` and `characters` (name: definition);
        - `.csv`, `.tsv`: a frame per row, under a header with `prompt` or with `character`, `interaction` and `scene`,
          and, if wanted, `negative` and `seed`;
        - `.txt`, `.md`, no suffix, standard input: a prompt per line or item of a list; what is fenced, or looks like
          one of the others, is read as that.

        Args:
            language: of a folder of ViStoryBench, "en" or "ch".
            on_notice: told how it was read where that isn't plain from its name, and what of it isn't used.

        Raises:
            InputError: the file is missing, isn't UTF-8, isn't a story, or is out of the bounds of
                `storyadapter.method.story_files.document`; the text names the file and the line.
        """
        file = read_story_file(path, language)
        story = pydantic.TypeAdapter(cls).validate_python(file.fields, context=file)
        for notice in file.notices:
            on_notice(notice)
        return story

    @classmethod
    def from_arguments(
        cls, arguments: Sequence[str], *, language: str = "en", on_notice: Callable[[Text], None] = lambda notice: None
    ) -> Self:
        """Read the published scripts' stories: one argument that is "-" or an existing path, whose name ends as one of
        a story file does, or that is a path by its looks (tales/fox, tale.yml2), is a story file; anything else is the
        prompts.

        Raises:
            InputError: as `from_file` and the class.
        """
        if len(arguments) == 1:
            (argument,) = arguments
            is_file = (
                argument == STANDARD_INPUT or argument.lower().endswith(STORY_SUFFIXES) or os.path.exists(argument)
            )
            if is_file or _PATH.fullmatch(argument):
                return cls.from_file(argument, language=language, on_notice=on_notice)
        return cls.from_prompts(arguments)

    def final_prompts(self, style: str | None = None) -> tuple[str, ...]:
        """What the text encoders get for each frame: characters' names replaced, then the style's text around it.

        A name is replaced where it stands as a whole word, in the same case; of two names that fit, by the longer one;
        names inside a definition stay. Accented letters match however they are composed, and where a script puts no
        spaces between words, a name needs none.

        Args:
            style: overrides the story's own; where neither says, the prompt stands alone (style "none").

        Raises:
            InputError: `style` is unknown.
        """
        before, after = STYLES[check_style(style or self.style or "none")]
        definitions = {normalized(name): definition for name, definition in self.characters.items()}
        finder = NameFinder(definitions)

        def defined(prompt: str) -> str:
            text, parts, done = normalized(prompt), list[str](), 0
            for place, name in finder.find(text):
                parts += text[done:place], definitions[name]
                done = place + len(name)
            return "".join((*parts, text[done:])) if parts else prompt

        return tuple(before + defined(prompt) + after for prompt in self.prompts)

    def final_frames(self, plan: RunPlan, style: str | None = None) -> tuple[FinalFrame, ...]:
        """What decides each frame's pixels; `style` and errors as for `final_prompts`."""
        return tuple(
            FinalFrame(
                prompt,
                frame.negative_prompt(plan) if plan.guided else None,
                plan.seed if frame.seed is None else frame.seed,
            )
            for prompt, frame in zip(self.final_prompts(style), self.frames, strict=True)
        )

    def negative_prompts(self, plan: RunPlan) -> tuple[str, ...]:
        """The distinct ones; none without guidance."""
        return tuple(dict.fromkeys(frame.negative_prompt(plan) for frame in self.frames)) if plan.guided else ()

    def characters_found(self) -> tuple[tuple[str, ...], ...]:
        """For each frame the names that are replaced in its prompt, each once, in their order there."""
        names = {normalized(name): name for name in self.characters}
        finder = NameFinder(names)
        found = (dict.fromkeys(name for _, name in finder.find(normalized(prompt))) for prompt in self.prompts)
        return tuple(tuple(names[name] for name in of_prompt) for of_prompt in found)

    def without_control(self) -> Self:
        """The same without the paths of control pictures."""
        frames = tuple(replace(frame, control=None) for frame in self.frames)
        return type(self)(frames, self.title, self.style, self.characters)

    def to_dict(self) -> dict[str, Any]:
        """The story as JSON values, under the keys of a story file. Equal stories give equal values."""
        return {
            "title": self.title,
            "style": self.style,
            "characters": dict(sorted(self.characters.items())),
            "prompts": [frame.to_dict() for frame in self.frames],
        }


def story_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of story files in YAML and JSON, for editors."""
    schema = pydantic.TypeAdapter(Story).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _refusal(wrong: list[ErrorDetails], file: StoryFile | None) -> InputError:
    """The first of the things that pydantic found wrong, but an unknown key first, in words and with its line."""
    unknown = "unexpected_keyword_argument"
    first = min(wrong, key=lambda details: details["type"] != unknown)
    top, *below = first["loc"]
    is_key = below[-1:] == ["[key]"]
    names = ["prompts", *(item.name for item in fields(Story)[1:])]
    # An argument is told by its position, a bad key by its repr.
    place = (names[top] if isinstance(top, int) else top, *([first["input"]] if is_key else below))
    keys = (*names[1:], names[0])
    match place:
        case "prompts", int(index), str(name), *_:
            titles = {"negative": "the negative prompt of ", "seed": "the seed of ", "control": "the control of "}
            what = titles.get(name, "")
            what += f"prompt {index + 1}"
            keys = tuple(item.name for item in fields(Frame))
        case "prompts", int(index):
            what = f"prompt {index + 1}"
        case "characters", name:
            what = "a character's name" if is_key else f"the definition of the character {excerpt(str(name).strip())}"
        case "title" | "style" as name, *_:
            what = f"the {name}"
        case _:
            what = excerpt(place[0])
    error = first.get("ctx", {}).get("error") or StoryError(f" can't be read: {first['msg']}")
    if first["type"] == unknown:
        error = _unknown("key", place[-1], keys)
        what = f"{what} has the " if below else ""
    elif not error.text().startswith(" "):
        what = ""
    found = what + spelled(error.args)
    where = file.where(*place, *getattr(error, "inside", ())) if file else ""
    return InputError(
        where + found, expected=error.expected, advice=error.advice, field=".".join(map(str, place))[:200]
    )
