"""A story as one moving picture, of a size that can be sent on."""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from io import BytesIO
from typing import Final, Literal, TypeAlias

from PIL import Image, features

from storyadapter.method.errors import Field, Text, UnavailableError
from storyadapter.output.overview import fit, scaled

FRAME_MILLISECONDS: Final = 800
LONGEST_SIDE: Final = 512
FRAMES_AT_MOST: Final = 200
PIXELS_AT_MOST: Final = 24_000_000  # of all frames: a GIF of noise, the worst there is, then has 16 MB
_PALETTE_SIDE: Final = 128  # of a frame's pixels that its palette is chosen from

Form: TypeAlias = Literal["gif", "webp"]


@dataclass(frozen=True)
class Extent:
    """Which frames of a story an animation shows, and their width and height in it."""

    frames: tuple[int, ...]
    size: tuple[int, int]
    notice: Text = ""  # what isn't shown as it is


def extent(name: str, size: tuple[int, int], frames: int) -> Extent:
    """At most 200 frames, evenly chosen, of at most 512 pixels and 24 million in all.

    Args:
        name: of the file, for the notice.
        size: of the frames, width and height.
    """
    count = min(frames, FRAMES_AT_MOST)
    chosen = tuple(round(place * (frames - 1) / max(1, count - 1)) for place in range(count))
    side = max(size) * math.sqrt(PIXELS_AT_MOST / count / (size[0] * size[1]))
    small, usual = fit(size, max(1.0, min(LONGEST_SIDE, side))), fit(size, LONGEST_SIDE)
    shown = f"{name} shows {count} of {frames} frames" if count < frames else f"{name} is small"
    notice = "" if count == frames and small == usual else f"{shown}, {small[0]}x{small[1]}, so that it can be sent on"
    return Extent(chosen, small, notice)


def check_form(form: Form) -> None:
    """Raises UnavailableError: Pillow can't write it here."""
    if form == "webp" and not features.check("webp"):
        raise UnavailableError(Field("animation"), f" {form}: Pillow was built without it", expected="gif")


def animation(form: Form, extent: Extent, read: Callable[[int], Image.Image], workers: Executor) -> bytes:
    """An endless animation, 800 ms per frame.

    In a GIF, every frame has a palette of its own. Equal frames in a row are stored once, with their times added.

    Args:
        read: a frame by its number, RGB.
        workers: threads that read frames and make them small.
    """

    def prepared(frame: int) -> Image.Image:
        small = scaled(read(frame), extent.size)
        return small if form == "webp" else _indexed(small)

    first, *rest = workers.map(prepared, extent.frames)
    options = {"quality": 85} if form == "webp" else {"optimize": False}
    file = BytesIO()
    first.save(file, form.upper(), save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0, **options)
    return file.getvalue()


def _indexed(frame: Image.Image) -> Image.Image:
    # Two passes: Pillow dithers only towards a palette it is given. Of every k-th pixel either way: to choose the
    # colours takes six times as long as all else.
    every = math.ceil(max(frame.size) / _PALETTE_SIDE)
    sample = frame.resize((-(-frame.width // every), -(-frame.height // every)), Image.Resampling.NEAREST)
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT)
    return frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
