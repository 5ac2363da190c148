"""The one way of text to a terminal, a log or a program that reads this one: what could act there is made visible.

File names, tensor names, prompts and other people's messages may hold escape sequences, line ends and marks that turn
the direction of writing.
"""

import json
import re
import sys
from dataclasses import asdict, is_dataclass
from typing import Any, Final

from storyadapter.method.errors import RunError

MAX_LETTERS: Final = 3_000  # of one message; a prompt may have a million
_ACTING: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""`text` with control characters, halves of surrogate pairs and marks of direction as escapes, such as `\x1b`.

    Args:
        keep: those that stay.
    """
    return _ACTING.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def one_line(text: str) -> str:
    """`text` visible and in one line; of one that is very long, beginning and end."""
    left_out = len(text) - MAX_LETTERS
    if left_out > 0:
        half = MAX_LETTERS // 2
        text = f"{text[:half]} … ({left_out:,} letters) … {text[-half:]}"
    return visible(text)


def json_line(value: Any) -> str:
    """JSON in one line, texts in it no longer than messages; `value` may hold what `str` makes text of."""
    text = json.dumps(_bounded(value), default=_plain, ensure_ascii=False)
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def tell(text: str) -> None:
    """Print a message to standard error, at once."""
    print(one_line(text), file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """Print to standard output, at once, as many lines as it has.

    Raises:
        BrokenPipeError: its reader went away.
        RunError: it can't be written, as when it goes to a file on a full disk.
    """
    try:
        print(visible(text, keep="\n"), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"standard output can't be written: {error.strerror}") from error


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_LETTERS:
        return f"{value[:MAX_LETTERS]}…"
    if isinstance(value, dict):
        return {str(key): _bounded(item) for key, item in value.items()}
    return [*map(_bounded, value)] if isinstance(value, list | tuple | range) else value


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
