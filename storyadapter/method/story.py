"""A story: its prompts, title, style and characters, from Python or from a YAML, JSON or text file."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from storyadapter.method.constants import STYLES
from storyadapter.method.errors import Field, InputError
from storyadapter.method.story_file import STORY_SUFFIXES, kind, read_story_file

_KEYS = ("title", "style", "characters", "prompts")
_PATH = re.compile(r"\S*/\S*|\S+\.[A-Za-z]\w{0,4}")


@dataclass(frozen=True)
class Story:
    """One picture per prompt, in story order.

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

    prompts: tuple[str, ...]
    title: str | None = None
    style: str | None = None
    # A dict has no hash; equal stories have equal hashes without it too.
    characters: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value in _checked(vars(self), lambda *place: "").items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_prompts(cls, prompts: Iterable[str]) -> Self:
        """A story of bare prompts. Raises: InputError, as for the class."""
        return cls(prompts if isinstance(prompts, str) else tuple(prompts))

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
        for key in file.fields:
            if key not in _KEYS:
                raise InputError(f"{file.where(key)}unknown key {_unknown(key, _KEYS)}")
        return cls(**_checked(file.fields, file.where))

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


def check_style(style: str) -> str:
    """Return `style` if it is one of `storyadapter.method.constants.STYLES`.

    Raises:
        InputError: it isn't; the text names the closest one and lists all.
    """
    if style not in STYLES:
        raise InputError(f"unknown style {_unknown(style, STYLES)}")
    return style


def _unknown(found: Any, known: Iterable[str]) -> str:
    known, text = tuple(known), str(found).lower()
    close = get_close_matches(text, known)
    close.sort(key=lambda name: name[:1] != text[:1])  # the first letter is seldom mistyped
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{found!r}, expected {', '.join(known[:-1])} or {known[-1]}{hint}"


def _checked(fields: Mapping[str, Any], where: Callable[..., str]) -> dict[str, Any]:
    """The story's fields with every type checked and normalized; `where(key, item)` starts a message."""
    prompts = fields.get("prompts")
    if not isinstance(prompts, list | tuple | None):
        raise InputError(f"{where('prompts')}'prompts' is {kind(prompts)}, expected a list with one text per frame")
    if not prompts:
        raise InputError(
            f"{where('prompts')}the story is empty,",
            expected="one prompt per frame",
            advice=("type ", Field("prompt"), " TEXT once per frame, or list them in the story file"),
        )
    title, style, characters = fields.get("title"), fields.get("style"), fields.get("characters")
    if title is not None:
        title = _text(title, "the title", where("title"))
    if style is not None:
        style = _text(style, "the style", where("style"))
        try:
            check_style(style)
        except InputError as error:
            raise InputError(f"{where('style')}{error}") from None
    if not isinstance(characters, Mapping | None):
        raise InputError(
            f"{where('characters')}'characters' is {kind(characters)}, expected a mapping of names to definitions"
        )
    definitions: dict[str, str] = {}
    for found, definition in (characters or {}).items():
        place = where("characters", found)
        name = _text(found, "a character's name", place)
        if name in definitions:
            raise InputError(f"{place}the character {name!r} is defined twice, expected once")
        definitions[name] = _text(definition, f"the definition of the character {name!r}", place)
    return {
        "prompts": tuple(_text(text, f"prompt {i}", where("prompts", i - 1)) for i, text in enumerate(prompts, 1)),
        "title": title,
        "style": style,
        "characters": definitions,
    }


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str | None):
        raise InputError(f"{where}{what} is {kind(value)}, expected text; put it in quotes")
    for char in value or "":
        # Control characters and halves of surrogate pairs: neither a tokenizer nor a picture's text can hold them.
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r":
            raise InputError(f"{where}{what} holds U+{ord(char):04X}, which is no printable character; take it out")
    if not value or not value.strip():
        found = "only white space" if value else "empty"
        raise InputError(f"{where}{what} is {found}, expected words; write some, or take it out")
    return value.strip()
