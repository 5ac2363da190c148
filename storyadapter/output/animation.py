"""The story as an animated GIF."""

from collections.abc import Iterable, Iterator
from io import BytesIO

from PIL import Image

from storyadapter.output.contact_sheet import fit, scaled

FRAME_MILLISECONDS = 800
MAX_PIXELS = 512  # longest side: a hundred frames stay well below what a browser loads


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
        small = scaled(frame, fit(frame.size, MAX_PIXELS))
        # Two passes: Pillow dithers only towards a palette it is given.
        palette = small.quantize(256, Image.Quantize.MEDIANCUT)
        yield small.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
