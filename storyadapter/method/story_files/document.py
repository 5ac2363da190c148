"""What a story file holds, not yet checked, and the bounds on what is read, which hold before anything is expanded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from storyadapter.method.errors import InputError, Text

MAX_BYTES: Final = 1 << 20  # far above any story; keeps a checkpoint named by mistake out of memory
MAX_DEPTH: Final = 32  # of values within values
MAX_VALUES: Final = 50_000  # each counted as often as an alias or a merge repeats it
MAX_DIGITS: Final = 40  # letters of a number or a date; Python prints no more than 4,300 digits
MAX_SECONDS: Final = 5.0

Place = tuple[Any, ...]


@dataclass(frozen=True)
class StoryFile:
    """What a story file holds, not yet checked.

    Attributes:
        name: of the file, as in messages.
        fields: its top-level keys, as text, and their values.
        lines: of a key `(key,)`, of an item `(key, index or name)` and of a key in that, counted from 1.
        notices: how it was read, where that isn't plain from its name, and what of it isn't used.
    """

    name: str
    fields: Any
    lines: Mapping[Place, int] = field(default_factory=dict)
    notices: tuple[Text, ...] = ()

    def where(self, *place: Any) -> str:
        """The start of an error message: the file, and the line of `place` or of what it stands in."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.lines:
                return at(self.name, self.lines[place[:end]])
        return f"{self.name}: "


def at(name: str, line: int) -> str:
    """The start of a message about a line."""
    return f"{name}, line {line}: "


def refuse_twice(name: str, lines: Mapping[Place, int], place: Place, line: int) -> None:
    """Parsers let a later key replace an earlier one. Raises InputError: `place` has a line already."""
    if place in lines:
        found = f"the key {excerpt(place[-1])} stands here and in line {lines[place]},"
        raise InputError(at(name, line) + found, expected="once")


def kind(value: Any) -> str:
    """A value of YAML, JSON or Python in words, for messages."""
    if isinstance(value, bool):
        return f"a truth value ({'true' if value else 'false'})"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, int | float):
        return f"a number ({value})"
    names = {type(None): "nothing", str: "text", bytes: "binary data", dict: "a mapping"}
    names |= dict.fromkeys((list, tuple), "a list")
    return names.get(type(value), f"a {type(value).__name__}")


def excerpt(value: Any, letters: int = 60) -> str:
    """A value's `repr`, of text no more than its beginning."""
    if isinstance(value, str):
        return repr(value if len(value) <= letters else value[:letters] + "…")
    return kind(value) if isinstance(value, int) and value.bit_length() > 128 else repr(value)[: 2 * letters]
