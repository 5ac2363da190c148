"""Errors a user can act on, as data: what was found, what was expected, what to do; with the command line's exit code.

A setting is named as a `Field`, never by an option's spelling: each face spells it as its own users type it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

_SAID_AT_MOST: Final = 500  # letters of another library's error


@dataclass(frozen=True)
class Field:
    """A setting, named as its argument is: "vae_precision"."""

    name: str


Text: TypeAlias = str | Field | tuple["Text", ...]


def plain(name: str) -> str:
    """A setting's spelling in Python and JSON: its name."""
    return name


def spelled(text: Text, spelling: Callable[[str], str] = plain) -> str:
    """A text with its fields as `spelling` gives them for their names."""
    return "".join(part if isinstance(part, str) else spelling(part.name) for part in _parts(text))


def _parts(text: Text) -> Iterator[str | Field]:
    if isinstance(text, tuple):
        for part in text:
            yield from _parts(part)
    else:
        yield text


def said(error: BaseException) -> str:
    """What another library or the system says in an error, as one line, never empty and never cut at a colon.

    Libraries put the fact on the lines that follow on a heading such as "Error(s) in loading state_dict for X:".
    """
    text = getattr(error, "strerror", None) or str(error)
    line = ""
    for part in filter(None, map(str.strip, text.splitlines())):
        line = f"{line} {part}".strip()
        if not line.endswith(":"):
            break
    return line.rstrip(".:; ")[:_SAID_AT_MOST] or type(error).__name__


def can_not_be_read(path: Path, error: Exception) -> str:
    """That a file can't be read, and the system's own reason."""
    return f"{path} can't be read: {said(error)}"


class StoryAdapterError(Exception):
    """Base of every error that is told to the user in one line, without a traceback.

    Args:
        found: parts of the text that says what was found. Where it ends with a comma, this stands before "expected".
        expected: what would have been right.
        advice: what to do.
        field: what it is about; by default the first field in `found`.
    """

    exit_code = 1

    def __init__(self, *found: Text, expected: Text = "", advice: Text = "", field: str | None = None) -> None:
        super().__init__(*found)  # these alone are `args`; a pickle holds the others as attributes
        self.expected, self.advice = expected, advice
        self.field = field or next((part.name for part in _parts(found) if isinstance(part, Field)), None)

    def text(self, spelling: Callable[[str], str] = plain) -> str:
        """The whole line: found; expected …; advice."""
        text = spelled(self.args, spelling)
        if self.expected:
            text += ("" if text.endswith(",") else ";") + f" expected {spelled(self.expected, spelling)}"
        return f"{text}; {spelled(self.advice, spelling)}" if self.advice else text

    def __str__(self) -> str:
        return self.text()

    def as_dict(self) -> dict[str, str | None]:
        """As JSON values; None for what isn't said."""
        return {
            "field": self.field,
            "found": spelled(self.args).rstrip(","),
            "expected": spelled(self.expected) or None,
            "advice": spelled(self.advice) or None,
        }


class InputError(StoryAdapterError):
    """The request can't be served as typed; nothing was written."""

    exit_code = 2


class CheckpointError(InputError):
    """Model files are missing, corrupt, or don't fit each other."""


class UnavailableError(InputError):
    """A backend, device or precision that can't be had on this machine."""


class EngineMismatchError(InputError):
    """The engine store holds no artefact for this request."""


class RunError(StoryAdapterError):
    """The run began and had to stop: no space left, a frame that came out non-finite, an engine that failed."""


class EngineBuildError(StoryAdapterError):
    """A builder refused a network, ended early, or made something that computes something else."""
