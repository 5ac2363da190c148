"""A run at a glance: the contact sheet, a row of thumbnails per iteration, a column per frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from storyadapter.output.files import make_folder, write_atomically
from storyadapter.output.frame_files import encode_png, iteration_name, read_picture
from storyadapter.output.lettering import Lettering

THUMBNAILS_NAME = ".thumbnails"  # the folder of the rows, below that of a run
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


def contact_sheet(
    rows: Sequence[Row], captions: Sequence[str], title: str | None = None, lettering: Lettering | None = None
) -> Image.Image:
    """Draw the sheet, an RGB picture of at most 8192 pixels either way.

    Under each column stands the frame's number, as in its file's name, and its caption, cut to four lines: both where
    the columns are wide enough.

    Args:
        rows: the iterations, first one on top.
        captions: one per frame.
        title: drawn above.
        lettering: what text is drawn with; letters that it lacks are boxes.
    """
    lettering = lettering or Lettering()
    frames = len(captions)
    width, height = rows[0].thumbnails.width // frames, rows[0].thumbnails.height
    gap = max(width, height) // _GAP
    left, top = _MARGIN + _LABEL_WIDTH, _MARGIN + (_HEAD if title else 0)
    numbers_fit = lettering.fits(_number(frames), width, _CAPTION_SIZE)
    captions_fit = numbers_fit and width >= _CAPTION_MIN_WIDTH
    lines_at_most = _CAPTION_LINES if captions_fit else 0
    wrapped = [lettering.wrap(text, width, _CAPTION_SIZE, lines_at_most) for text in captions]
    foot_lines = (1 if numbers_fit else 0) + max(map(len, wrapped))
    foot = math.ceil(foot_lines * _CAPTION_SIZE * _LINE) + (10 if foot_lines else 0)
    right = left + frames * width + (frames - 1) * gap
    bottom = top + len(rows) * height + (len(rows) - 1) * gap
    sheet = Image.new("RGB", (right + _MARGIN, bottom + foot + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        shown = lettering.shorten(" ".join(title.split()), right - _MARGIN, _TITLE_SIZE)
        lettering.draw(draw, (_MARGIN, _MARGIN), shown, _INK, _TITLE_SIZE)
    for index, row in enumerate(rows):
        y = top + index * (height + gap)
        _draw_label(draw, lettering, row, y, height)
        for frame in range(frames):
            thumbnail = row.thumbnails.crop((frame * width, 0, (frame + 1) * width, height))
            sheet.paste(thumbnail, (left + frame * (width + gap), y))
    if numbers_fit:
        for frame, lines in enumerate(wrapped):
            x = left + frame * (width + gap)
            lettering.draw(draw, (x, bottom + 10), _number(frame), _INK, _CAPTION_SIZE)
            for number, line in enumerate(lines, 1):
                y = bottom + 10 + number * _CAPTION_SIZE * _LINE
                lettering.draw(draw, (x, y), line, _FAINT, _CAPTION_SIZE)
    return sheet


def _draw_label(draw: ImageDraw.ImageDraw, lettering: Lettering, row: Row, y: int, height: int) -> None:
    """The iteration's name and detail, halfway up the row; smaller, and without the detail, where rows are low."""
    sizes = (_LABEL_SIZE, _CAPTION_SIZE) if height >= 48 else (min(_CAPTION_SIZE, height),)
    if sizes[-1] < 6:
        return
    y_text = y + (height - sum(sizes) * _LINE) / 2
    for text, size, color in zip((row.label, row.detail), sizes, (_INK, _FAINT), strict=False):
        lettering.draw(draw, (_MARGIN, y_text), text, color, size)
        y_text += size * _LINE


def _number(frame: int) -> str:
    return f"{frame:03d}"


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

    def thumbnails(self, iteration: int) -> list[Image.Image]:
        """Those of a row that was written. Raises RunError: it doesn't open any more."""
        strip = read_picture(self.path(iteration))
        width = strip.width // self._frames
        return [strip.crop((frame * width, 0, (frame + 1) * width, strip.height)) for frame in range(self._frames)]

    def write(self, iteration: int, thumbnails: Sequence[Image.Image]) -> bytes:
        """Write a row; returns the file's bytes. Raises RunError: no space is left, or the folder can't be written."""
        path = self.path(iteration)
        make_folder(path.parent)
        data = encode_png(join(thumbnails), {})
        write_atomically(path, data)
        return data

    def sheet(
        self, scales: Sequence[float | None], captions: Sequence[str], title: str | None, lettering: Lettering
    ) -> Image.Image:
        """The contact sheet of all rows, from λ of every iteration (None for the text-only one) and a text per frame.

        Raises:
            RunError: a row doesn't open any more.
        """
        rows = []
        for index, scale in enumerate(scales):
            detail = "text only" if scale is None else f"scale {scale:.3g}"
            rows.append(Row(read_picture(self.path(index)), f"iteration {index}", detail))
        return contact_sheet(rows, captions, title, lettering)
