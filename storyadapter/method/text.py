"""Text of users: what can be drawn of it, and where names stand in it."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final

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


class NameFinder:
    """Finds where names stand as whole words, in the same case; of two that fit, the longer one.

    Names and texts are normalized ones. What it takes grows with the text, not with the number of names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._first: dict[str, Any] = {}  # a letter -> what may follow on it; "" -> the name that ends there
        for name in names:
            letters = self._first
            for letter in name:
                letters = letters.setdefault(letter, {})
            letters[""] = name
        self._any = re.compile(_pattern(self._first) or r"\b\B")  # without names, what is nowhere

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Places and names, from the left."""
        place = 0
        while match := self._any.search(text, place):
            place = match.start()
            name = self._name_at(text, place)
            if name:
                yield place, name
            place += len(name) or 1
            while not name and _joined(text, place):  # no name begins within a word
                place += 1

    def _name_at(self, text: str, place: int) -> str:
        """The longest name that begins there; empty if there is none."""
        longest, letters, end = "", self._first, place
        if _joined(text, place):
            return longest
        while end < len(text) and text[end] in letters:
            letters = letters[text[end]]
            end += 1
            if "" in letters and not _joined(text, end):
                longest = letters[""]
        return longest


def _pattern(letters: dict[str, Any]) -> str:
    """A regular expression of all that begins so: the names are few steps from any letter of a text."""
    followed = [re.escape(letter) + _pattern(below) for letter, below in letters.items() if letter]
    one_of = f"(?:{'|'.join(followed)})" if len(followed) > 1 or (followed and "" in letters) else "".join(followed)
    return f"{one_of}?" if followed and "" in letters else one_of


def _joined(text: str, place: int) -> bool:
    """Whether the letters before and behind a place belong to one word."""
    return 0 < place < len(text) and _join(text[place - 1], text[place])


@lru_cache(maxsize=1 << 16)
def _join(before: str, behind: str) -> bool:
    if unicodedata.category(behind).startswith("M"):  # a mark, which changes the letter before it
        return True
    return all(_is_letter(char) and not stands_without_spaces(char) for char in (before, behind))


def _is_letter(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")


def stands_without_spaces(char: str) -> bool:
    """Whether a letter is of a script that puts no spaces between words."""
    return char > "\u0dff" and unicodedata.name(char, "").startswith(_WITHOUT_SPACES)
