"""A row of small pictures per iteration, kept beside a run, of which its contact sheet is made."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from storyadapter.output.contact_sheet import Row, contact_sheet, join, scaled, thumbnail_size
from storyadapter.output.files import make_folder, write_atomically
from storyadapter.output.frame_files import encode_png, read_picture


class ThumbnailStrips:
    """The rows in one folder, which is made when the first is written.

    Args:
        folder: holds them.
        frames: N, pictures of a row.
        iterations: rows of the whole run.
    """

    def __init__(self, folder: Path, frames: int, iterations: int) -> None:
        self._folder = folder
        self._frames = frames
        self._iterations = iterations

    def path(self, iteration: int) -> Path:
        """Where a row lies."""
        return self._folder / f"{iteration_name(iteration, self._iterations)}.png"

    def thumbnail(self, picture: Image.Image) -> Image.Image:
        """A frame as small as the contact sheet shows it."""
        return scaled(picture, thumbnail_size(picture.size, self._frames, self._iterations))

    def write(self, iteration: int, thumbnails: Sequence[Image.Image]) -> None:
        """Write a row.

        Raises:
            RunError: no space is left, or the folder can't be written.
        """
        path = self.path(iteration)
        make_folder(path.parent)
        write_atomically(path, encode_png(join(thumbnails), {}))

    def sheet(self, scales: Sequence[float | None], captions: Sequence[str], title: str | None) -> Image.Image:
        """The contact sheet of all rows.

        Args:
            scales: λ of every iteration, None for the text-only one.
            captions: one per frame.

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
