"""A story: its prompts, title, style and characters, from Python or from a file."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import pydantic
from pydantic import BeforeValidator, ModelWrapValidatorHandler, ValidationInfo
from pydantic_core import ErrorDetails

from storyadapter.method.constants import STYLES
from storyadapter.method.errors import Field, InputError, Text, spelled
from storyadapter.method.plan import RunPlan
from storyadapter.method.story_files.document import StoryFile, excerpt
from storyadapter.method.story_files.reading import STANDARD_INPUT, STORY_SUFFIXES, read_story_file
from storyadapter.method.story_parts import (
    MAX_FRAMES,
    Character,
    Frame,
    GivenCharacter,
    GivenFrame,
    StoryError,
    StyleName,
    Words,
    check_style,
    checked_characters,
    checked_frames,
    unknown_name,
)
from storyadapter.method.text import NameFinder, normalized

_PATH = re.compile(r"\S*/\S*|\S+\.[A-Za-z]\w{0,4}")


@dataclass(frozen=True)
class FinalFrame:
    """All that decides a frame's pixels beside the plan; `negative_prompt`: None if unguided; `references`: keys of a
    user's pictures that it attends to; `chunks`: in which its texts are read."""

    prompt: str
    negative_prompt: str | None
    seed: int
    references: tuple[str, ...] = ()
    chunks: int = 1


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class Story:
    """One picture per prompt, in story order; also the schema of a story file.

    White space at the ends of prompts, names, definitions and the title is dropped.

    Attributes:
        frames: one per picture, at least one; given as `prompts`, each a text or a mapping with `prompt` and, if
            wanted, `negative`, `seed` and `control`.
        title: shown on the contact sheet; no part of any prompt.
        style: a name of `storyadapter.method.constants.STYLES`, or None if the story doesn't say.
        characters: name -> `Character`, or its definition alone, which takes the name's place in every prompt.

    Raises:
        InputError: no prompt; a value that isn't text, is blank, or holds characters that can't be printed; an unknown
            style or key; a seed out of range; more than 10,000 prompts or 1,000 characters.
    """

    frames: Annotated[tuple[GivenFrame, ...], BeforeValidator(checked_frames)] = pydantic.Field(
        default=(), alias="prompts", validate_default=True, min_length=1, max_length=MAX_FRAMES
    )
    title: Words | None = None
    style: StyleName | None = None
    # A dict has no hash; equal stories have equal hashes without it too.
    characters: Annotated[dict[Words, GivenCharacter], BeforeValidator(checked_characters)] = field(
        default_factory=dict, hash=False
    )

    if TYPE_CHECKING:  # what is given, before it is validated

        def __init__(
            self,
            prompts: Sequence[str | Frame | Mapping[str, Any]] = (),
            title: str | None = None,
            style: str | None = None,
            characters: Mapping[str, str | Character | Mapping[str, Any]] | None = None,
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

    def edited(self, changes: Mapping[int, Mapping[str, Any]]) -> Self:
        """The story with other values of some frames: frame → {"prompt": …, "negative": …, "seed": …,
        "control": …}, each if wanted.

        Raises:
            InputError: there is no such frame, nothing changes, or a value that no frame can have.
        """
        frames: list[Any] = list(self.frames)
        for number, values in changes.items():
            if number not in range(len(frames)):
                expected = f"0 to {len(frames) - 1}" if len(frames) > 1 else "0, the story's only one"
                raise InputError(Field("frame"), f" is {number}", expected=expected)
            kept = {item.name: getattr(frames[number], item.name) for item in fields(Frame)}
            frames[number] = {name: value for name, value in kept.items() if value is not None} | dict(values)
        given = {item.name: getattr(self, item.name) for item in fields(self)[1:]}
        return pydantic.TypeAdapter(type(self)).validate_python({"prompts": frames, **given})

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
        definitions = {normalized(name): who.definition for name, who in self.characters.items() if who.definition}
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
        return self.with_control([None] * len(self.frames))

    def with_control(self, paths: Sequence[Sequence[str | None] | None]) -> Self:
        """The same with other control pictures: of each frame one path per ControlNet, or None. Raises InputError: a
        value that no frame can have."""
        pairs = zip(self.frames, paths, strict=True)
        frames = tuple(replace(frame, control=None if control is None else tuple(control)) for frame, control in pairs)
        return type(self)(frames, self.title, self.style, self.characters)

    def references(self) -> tuple[tuple[str, ...], ...]:
        """For each frame the files of pictures that it attends to, each once: of the characters that its prompt names,
        in their order there, then its own."""
        found = self.characters_found()
        named = ([path for name in names for path in self.characters[name].references] for names in found)
        return tuple(
            tuple(dict.fromkeys((*paths, *frame.references))) for paths, frame in zip(named, self.frames, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """The story as JSON values, under the keys of a story file. Equal stories give equal values."""
        return {
            "title": self.title,
            "style": self.style,
            "characters": {name: who.to_dict() for name, who in sorted(self.characters.items())},
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
            titles["references"] = "the references of "
            what = titles.get(name, "") + f"prompt {index + 1}"
            keys = tuple(item.name for item in fields(Frame))
        case "prompts", int(index):
            what = f"prompt {index + 1}"
        case "characters", name:
            what = "a character's name" if is_key else f"the definition of the character {excerpt(str(name).strip())}"
        case "characters", name, str(part), *_:
            whose = f"the character {excerpt(str(name).strip())}"
            what = f"the {part} of {whose}" if part in ("definition", "references") else whose
            keys = tuple(item.name for item in fields(Character))
        case "title" | "style" as name, *_:
            what = f"the {name}"
        case _:
            what = excerpt(place[0])
    error = first.get("ctx", {}).get("error") or StoryError(f" can't be read: {first['msg']}")
    if first["type"] == unknown:
        error = unknown_name("key", place[-1], keys)
        what = f"{what} has the " if below else ""
    elif not error.text().startswith(" "):
        what = ""
    found = what + spelled(error.args)
    where = file.where(*place, *getattr(error, "inside", ())) if file else ""
    return InputError(
        where + found, expected=error.expected, advice=error.advice, field=".".join(map(str, place))[:200]
    )
