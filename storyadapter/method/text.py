"""Text of users: what can be drawn of it, and where names stand in it."""

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Final

# Scripts that put no spaces between words: there, a name may touch what it doesn't belong to. Korean puts its
# particles behind names without a space.
_WITHOUT_SPACES: Final = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "KHMER", "LAO", "MYANMAR", "THAI", "TIBETAN")


def unprintable(text: str) -> str | None:
    """The first character that neither a tokenizer nor a picture's text can hold, as "U+0007": control characters
    other than white space, and halves of surrogate pairs."""
    found = (char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r")
    return next((f"U+{ord(char):04X}" for char in found), None)


def normalized(text: str) -> str:
    """One spelling (NFC) of what looks alike, as both of SDXL's tokenizers make it."""
    return unicodedata.normalize("NFC", text)


def names_in(text: str, names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Where names stand as whole words, in the same case: the place and the name; of two that fit, the longer one.

    Text and names are normalized ones.
    """
    by_start: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        by_start.setdefault(name[:1], []).append(name)
    place = 0
    while place < len(text):
        for name in by_start.get(text[place], ()):
            end = place + len(name)
            if text.startswith(name, place) and not _joined(text, place) and not _joined(text, end):
                yield place, name
                place = end - 1
                break
        place += 1


def _joined(text: str, place: int) -> bool:
    """Whether the letters before and behind a place belong to one word."""
    if not 0 < place < len(text):
        return False
    before, behind = text[place - 1], text[place]
    if unicodedata.category(behind).startswith("M"):  # a mark, which changes the letter before it
        return True
    return all(_is_letter(char) and not stands_without_spaces(char) for char in (before, behind))


def _is_letter(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")


def stands_without_spaces(char: str) -> bool:
    """Whether a letter is of a script that puts no spaces between words."""
    return char > "\u0dff" and unicodedata.name(char, "").startswith(_WITHOUT_SPACES)
