"""Text in pictures, in any script for which there is a font: one's own, the package's, or those of the system."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Final

from PIL import ImageDraw, ImageFont

from storyadapter.method.errors import Field, InputError, Text
from storyadapter.method.text import stands_without_spaces

OWN_FONT: Final = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
_SYSTEM_FOLDERS: Final = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (r"C:\Windows\Fonts", r"~\AppData\Local\Microsoft\Windows\Fonts"),
}
_OTHER_FOLDERS: Final = ("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")
_FONTS_TRIED: Final = 500
_TRIED_SIZE: Final = 14
_NO_GLYPH: Final = "\uffff"
_LETTERS_AT_MOST: Final = 4_000  # of a text that is looked at; no picture has room for as many


class Lettering:
    """Measures and draws lines of text; each letter with the first font that has it.

    Args:
        font: a file that comes before the package's own font and the system's.

    Raises:
        InputError: `font` isn't a font.
    """

    def __init__(self, font: Path | None = None) -> None:
        if font is not None and not _opens(font):
            raise InputError(Field("font"), f" {font} can't be opened as a font", expected="a .ttf, .otf or .ttc file")
        self._first = [font] if font else []
        self._first.append(OWN_FONT)
        self._known: dict[str, Path | None] = {}

    def lacking(self, texts: Iterable[str]) -> str:
        """The letters for which there is no font, each once; drawn, they are boxes."""
        letters = dict.fromkeys(letter for text in texts for letter in text)
        return "".join(letter for letter in letters if _has_shape(letter) and self._font_of(letter) is None)

    def notice(self, texts: Iterable[str]) -> Text:
        """What is to be told of the letters that are lacking; empty where there are none."""
        letters = self.lacking(texts)
        if not letters:
            return ""
        names = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in letters[:8])
        more = f" and {len(letters) - 8} others" if len(letters) > 8 else ""
        return (
            f"no font here has {names}{more}: in pictures they are boxes; give a font that has them with ",
            Field("font"),
        )

    def width(self, text: str, size: int) -> float:
        """Pixels of a line."""
        return sum(_open(font, size).getlength(part) for font, part in self._parts(text))

    def fits(self, text: str, width: float, size: int) -> bool:
        return self.width(text, size) <= width

    def draw(
        self,
        draw: ImageDraw.ImageDraw,
        place: tuple[float, float],
        text: str,
        color: str | tuple[int, int, int],
        size: int,
    ) -> None:
        """Draw a line whose top left corner is at `place`."""
        x, y = place
        baseline = y + _open(self._first[0], size).getmetrics()[0]
        for font, part in self._parts(text):
            opened = _open(font, size)
            draw.text((x, baseline), part, color, opened, anchor="ls")
            x += opened.getlength(part)

    def shorten(self, text: str, width: float, size: int) -> str:
        """`text` cut to `width` pixels, with an ellipsis if something is missing."""
        text = text[:_LETTERS_AT_MOST]
        if self.fits(text, width, size):
            return text
        low, high = 0, len(text)
        while low + 1 < high:
            middle = (low + high) // 2
            fits = self.fits(text[:middle].rstrip() + "…", width, size)
            low, high = (middle, high) if fits else (low, middle)
        return text[:low].rstrip() + "…"

    def wrap(self, text: str, width: float, size: int, most: int) -> list[str]:
        """`text` in at most so many lines of `width` pixels; an ellipsis where it goes on."""
        lines: list[str] = []
        pieces = [*_pieces(text[:_LETTERS_AT_MOST])]
        while pieces and len(lines) < most:
            count, line = 1, pieces[0]
            while count < len(pieces) and self.fits((line + pieces[count]).strip(), width, size):
                line += pieces[count]
                count += 1
            if len(lines) == most - 1:
                count, line = len(pieces), "".join(pieces)
            lines.append(self.shorten(line.strip(), width, size))
            pieces = pieces[count:]
        return lines

    def _parts(self, text: str) -> Iterator[tuple[Path, str]]:
        """Parts of a line by their fonts; marks and spaces go with the letter before them."""
        start, font = 0, None
        for place, letter in enumerate(text):
            own = self._font_of(letter) or self._first[0] if _has_shape(letter) else font
            if font is not None and own != font:
                yield font, text[start:place]
                start = place
            font = own
        if text:
            yield font or self._first[0], text[start:]

    def _font_of(self, letter: str) -> Path | None:
        if letter not in self._known:
            fonts = (font for source in (self._first, self._system) for font in source if _has(font, letter))
            self._known[letter] = next(fonts, None)
        return self._known[letter]

    @cached_property
    def _system(self) -> list[Path]:
        """Fonts of the system, upright and regular ones first."""
        folders = [Path(folder).expanduser() for folder in _SYSTEM_FOLDERS.get(sys.platform, _OTHER_FOLDERS)]
        files = [
            Path(where, name)
            for folder in folders
            for where, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith((".ttf", ".otf", ".ttc"))
        ]
        files.sort(key=lambda path: (any(word in path.stem.lower() for word in ("bold", "italic", "oblique")), path))
        return files[:_FONTS_TRIED]


def _pieces(text: str) -> Iterator[str]:
    """Where a line may end: words with the space before them; letters of scripts that put no spaces between words."""
    piece = ""
    for letter in text:
        may_end = letter.isspace() or (stands_without_spaces(letter) and not _is_mark(letter))
        if may_end and piece.strip():
            yield piece
            piece = ""
        piece += " " if letter.isspace() else letter
    if piece.strip():
        yield piece


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter).startswith("M")


def _has_shape(letter: str) -> bool:
    """Whether a letter is drawn by itself: no space, no mark, nothing that only changes its neighbours."""
    return unicodedata.category(letter)[0] not in "ZCM"


@cache
def _open(font: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font), size)


@cache
def _opens(font: Path) -> bool:
    try:
        _open(font, _TRIED_SIZE)
    except (OSError, ValueError):  # as of a font that has pictures of one size alone
        return False
    return True


@cache
def _no_glyph(font: Path) -> tuple[tuple[int, int], bytes]:
    mask = _open(font, _TRIED_SIZE).getmask(_NO_GLYPH)
    return mask.size, bytes(mask)


def _has(font: Path, letter: str) -> bool:
    """Whether a font has a glyph for a letter: what it draws isn't what it draws for no letter at all."""
    if not _opens(font):
        return False
    mask = _open(font, _TRIED_SIZE).getmask(letter)
    return mask.getbbox() is not None and (mask.size, bytes(mask)) != _no_glyph(font)
