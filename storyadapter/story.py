"""A story: its prompts, title, style and characters, from Python or from a YAML, JSON or text file."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from storyadapter.errors import InputError
from storyadapter.method import STYLES
from storyadapter.story_file import STORY_SUFFIXES, read_story_file


@dataclass(frozen=True)
class Story:
    """One picture per prompt, in story order.

    White space at the ends of prompts, names and definitions is dropped.

    Attributes:
        prompts: one per frame, at least one.
        title: shown on the contact sheet; no part of any prompt.
        style: a name of `storyadapter.method.STYLES`, or None if the story doesn't say.
        characters: name -> definition, which stands in for the name in every prompt.

    Raises:
        InputError: no prompt; text that is blank, isn't text, or holds characters that can't be printed; an unknown style.
    """

    prompts: tuple[str, ...]
    title: str | None = None
    style: str | None = None
    # A dict has no hash; equal stories still have equal hashes without it.
    characters: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise InputError("prompts are one string, expected a list with one prompt per frame")
        prompts = tuple(_text(f"prompt {i}", prompt) for i, prompt in enumerate(self.prompts, 1))
        if not prompts:
            raise InputError("the story is empty: expected one prompt per frame; type --prompt TEXT once per frame")
        characters: dict[str, str] = {}
        for name, definition in self.characters.items():
            name = _text("a character's name", name)
            if name in characters:
                raise InputError(f"the character {name!r} is defined twice, expected one definition per name")
            characters[name] = _text(f"the definition of the character {name!r}", definition)
        if self.style is not None:
            check_style(self.style)
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "characters", characters)
        object.__setattr__(self, "title", None if self.title is None else _text("the title", self.title))

    @classmethod
    def from_prompts(cls, prompts: Iterable[str]) -> Self:
        """A story of bare prompts. Raises: InputError, as for the class."""
        return cls(tuple(prompts) if not isinstance(prompts, str) else prompts)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a story file: `.yaml`/`.yml`, `.json`, or plain text under any other name.

        YAML and JSON hold a mapping of `prompts` (a list of strings) and, if wanted, `title`, `style` and
        `characters` (name: definition). Plain text holds a prompt per line; blank lines are skipped, and there
        is no syntax for comments. Files are UTF-8.

        Raises:
            InputError: the file is missing, no file, not UTF-8, or not a story; the text names the place.
        """
        path = Path(path)
        fields, places = read_story_file(path)
        for key, check in _CHECKS.items():
            if fields.get(key) is not None:
                check(fields[key], path, places)
        if fields.get("prompts") is None:
            raise InputError(f"{path}: the story is empty: found no prompts, expected one per frame under 'prompts:'")
        try:
            return cls(
                prompts=tuple(fields["prompts"]),
                title=fields.get("title"),
                style=fields.get("style"),
                characters=fields.get("characters") or {},
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
