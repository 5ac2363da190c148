"""A run at a glance: the contact sheet, a row of thumbnails per iteration, a column per frame; and an animated GIF."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from storyadapter.output.files import make_folder, write_atomically
from storyadapter.output.frame_files import encode_png, read_picture

FRAME_MILLISECONDS = 800
GIF_PIXELS = 512  # longest side: a hundred frames stay well below what a browser loads
THUMBNAIL_PIXELS = 256  # longest side
MAX_PIXELS = 8192  # of the sheet, either way: what viewers and browsers still open

_BACKGROUND = "white"
_INK = (32, 33, 36)
_FAINT = (112, 116, 122)
_MARGIN = 32
_GAP = 32  # a gap is this part of a thumbnail's longer side
_LABEL_WIDTH = 128
_CAPTION_LINES = 4
_CAPTION_MIN_WIDTH = 110  # narrower columns break most words
_TITLE_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 30, 18, 14
_LINE = 1.35  # line height over font size
_FOOT = 16 + math.ceil((_CAPTION_LINES + 1) * _CAPTION_SIZE * _LINE)  # below the last row: frame number and prompt
_HEAD = math.ceil(_TITLE_SIZE * _LINE) + 16


@dataclass(frozen=True)
class Row:
    """One iteration: its thumbnails side by side without gaps, and the lines that stand beside them."""

    thumbnails: Image.Image
    label: str
    detail: str


def fit(size: tuple[int, int], bound: float) -> tuple[int, int]:
    """The size (width, height) whose longer side is at most `bound`; small pictures are magnified by whole numbers."""
    limit, longest = math.floor(bound), max(size)
    if limit >= longest:
        return size[0] * (limit // longest), size[1] * (limit // longest)
    return max(1, size[0] * limit // longest), max(1, size[1] * limit // longest)


def scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` at `size`: averaged when smaller, with its pixels kept as squares when larger."""
    if size == image.size:
        return image.copy()
    larger = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def thumbnail_size(frame_size: tuple[int, int], frames: int, iterations: int) -> tuple[int, int]:
    """Width and height of the thumbnails of a sheet of `frames` columns and `iterations` rows."""
    wide = (MAX_PIXELS - 2 * _MARGIN - _LABEL_WIDTH) / frames
    high = (MAX_PIXELS - 2 * _MARGIN - _HEAD - _FOOT) / iterations
    longest = max(frame_size)
    bound = min(wide / (frame_size[0] / longest + 1 / _GAP), high / (frame_size[1] / longest + 1 / _GAP))
    return fit(frame_size, min(THUMBNAIL_PIXELS, bound))


def join(thumbnails: Sequence[Image.Image]) -> Image.Image:
    """The pictures, all of one size, side by side without gaps."""
    width, height = thumbnails[0].size
    strip = Image.new("RGB", (width * len(thumbnails), height))
    for index, thumbnail in enumerate(thumbnails):
        strip.paste(thumbnail, (index * width, 0))
    return strip


def contact_sheet(rows: Sequence[Row], captions: Sequence[str], title: str | None = None) -> Image.Image:
    """Draw the sheet, an RGB picture of at most 8192 pixels either way.

    Under each column stands the frame's number, as in its file's name, and its caption, cut to four lines: both where
    the columns are wide enough, and the caption unless Pillow's font lacks a letter of it.

    Args:
        rows: the iterations, first one on top.
        captions: one per frame.
        title: drawn above, if Pillow's font has its letters.
    """
    frames = len(captions)
    width, height = rows[0].thumbnails.width // frames, rows[0].thumbnails.height
    gap = max(width, height) // _GAP
    title = title if title and _drawable(title) else None
    left, top = _MARGIN + _LABEL_WIDTH, _MARGIN + (_HEAD if title else 0)
    numbers_fit = _fits(_number(frames), width, _CAPTION_SIZE)
    captions_fit = numbers_fit and width >= _CAPTION_MIN_WIDTH
    wrapped = [_wrap(text, width) if captions_fit and _drawable(text) else [] for text in captions]
    foot_lines = (1 if numbers_fit else 0) + max(map(len, wrapped))
    foot = math.ceil(foot_lines * _CAPTION_SIZE * _LINE) + (10 if foot_lines else 0)
    right = left + frames * width + (frames - 1) * gap
    bottom = top + len(rows) * height + (len(rows) - 1) * gap
    sheet = Image.new("RGB", (right + _MARGIN, bottom + foot + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), _shorten(title, right - _MARGIN, _TITLE_SIZE), _INK, _font(_TITLE_SIZE))
    for index, row in enumerate(rows):
        y = top + index * (height + gap)
        _draw_label(draw, row, y, height)
        for frame in range(frames):
            thumbnail = row.thumbnails.crop((frame * width, 0, (frame + 1) * width, height))
            sheet.paste(thumbnail, (left + frame * (width + gap), y))
    if numbers_fit:
        for frame, lines in enumerate(wrapped):
            x = left + frame * (width + gap)
            draw.text((x, bottom + 10), _number(frame), _INK, _font(_CAPTION_SIZE))
            for number, line in enumerate(lines, 1):
                y = bottom + 10 + number * _CAPTION_SIZE * _LINE
                draw.text((x, y), line, _FAINT, _font(_CAPTION_SIZE))
    return sheet


def _draw_label(draw: ImageDraw.ImageDraw, row: Row, y: int, height: int) -> None:
    """The iteration's name and detail, halfway up the row; smaller, and without the detail, where rows are low."""
    sizes = (_LABEL_SIZE, _CAPTION_SIZE) if height >= 48 else (min(_CAPTION_SIZE, height),)
    if sizes[-1] < 6:
        return
    y_text = y + (height - sum(sizes) * _LINE) / 2
    for text, size, color in zip((row.label, row.detail), sizes, (_INK, _FAINT), strict=False):
        draw.text((_MARGIN, y_text), text, color, _font(size))
        y_text += size * _LINE


def _number(frame: int) -> str:
    return f"{frame:03d}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _drawable(text: str) -> bool:
    """Whether Pillow's own font, which has few letters beyond ASCII, has a glyph for every letter."""
    font = _font(_CAPTION_SIZE)

    def glyph(char: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(char)
        return mask.size, bytes(mask)

    missing = glyph("\uffff")
    return all(char.isspace() or glyph(char) != missing for char in set(text))


def _wrap(text: str, width: int) -> list[str]:
    """`text` in at most `_CAPTION_LINES` lines of `width` pixels; an ellipsis where it goes on."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < _CAPTION_LINES:
        count = 1
        while count < len(words) and _fits(" ".join(words[: count + 1]), width, _CAPTION_SIZE):
            count += 1
        if len(lines) == _CAPTION_LINES - 1:
            count = len(words)
        lines.append(_shorten(" ".join(words[:count]), width, _CAPTION_SIZE))
        words = words[count:]
    return lines


def _shorten(text: str, width: int, size: int) -> str:
    """`text` cut to `width` pixels, with an ellipsis if something is missing."""
    if _fits(text, width, size):
        return text
    low, high = 0, len(text)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(text[:middle].rstrip() + "…", width, size) else (low, middle)
    return text[:low].rstrip() + "…"


def _fits(text: str, width: int, size: int) -> bool:
    return _font(size).getlength(text) <= width


class ThumbnailStrips:
    """The rows of a contact sheet, kept beside a run in a folder that is made when the first is written."""

    def __init__(self, folder: Path, frames: int, iterations: int) -> None:
        self._folder = folder
        self._frames = frames
        self._iterations = iterations

    def path(self, iteration: int) -> Path:
        return self._folder / f"{iteration_name(iteration, self._iterations)}.png"

    def thumbnail(self, picture: Image.Image) -> Image.Image:
        """A frame as small as the contact sheet shows it."""
        return scaled(picture, thumbnail_size(picture.size, self._frames, self._iterations))

    def write(self, iteration: int, thumbnails: Sequence[Image.Image]) -> bytes:
        """Write a row; returns the file's bytes. Raises RunError: no space is left, or the folder can't be written."""
        path = self.path(iteration)
        make_folder(path.parent)
        data = encode_png(join(thumbnails), {})
        write_atomically(path, data)
        return data

    def sheet(self, scales: Sequence[float | None], captions: Sequence[str], title: str | None) -> Image.Image:
        """The contact sheet of all rows, from λ of every iteration (None for the text-only one) and a text per frame.

        Raises:
            RunError: a row doesn't open any more.
        """
        rows = []
        for index, scale in enumerate(scales):
            detail = "text only" if scale is None else f"scale {scale:.3g}"  # Pillow's font has no λ
            rows.append(Row(read_picture(self.path(index)), f"iteration {index}", detail))
        return contact_sheet(rows, captions, title)


def iteration_name(iteration: int, iterations: int) -> str:
    """ "iteration-00", with as many digits as all of them need."""
    return f"iteration-{iteration:0{max(2, len(str(iterations - 1)))}d}"


def gif(frames: Iterable[Image.Image]) -> bytes:
    """An endless GIF of RGB pictures of one size, 800 ms each, at most 512 pixels wide or high.

    Every frame has a palette of its own. Equal frames in a row are stored once, with their times added.
    """
    first, *rest = _indexed(frames)
    file = BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0, optimize=False)
    return file.getvalue()


def _indexed(frames: Iterable[Image.Image]) -> Iterator[Image.Image]:
    for frame in frames:
        small = scaled(frame, fit(frame.size, GIF_PIXELS))
        # Two passes: Pillow dithers only towards a palette it is given.
        palette = small.quantize(256, Image.Quantize.MEDIANCUT)
        yield small.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
