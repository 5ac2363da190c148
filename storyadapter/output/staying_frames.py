"""Frames that an edit of a finished run leaves as they are: whichever jobs drew them, new ones attend to them."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import Image

from storyadapter.output.files import sha256
from storyadapter.output.frame_files import frame_path, read_frame
from storyadapter.output.overview import ThumbnailStrips
from storyadapter.output.run_record import RunRecord
from storyadapter.runtime.frame_store import StoredFrame

_STRIPS_KEPT: Final = 2


@dataclass(frozen=True, eq=False)
class StayingFrame:
    """A frame that stays, and the hash of its file, which may have been removed."""

    stored: StoredFrame
    sha256: str


class StayingFrames:
    """Of a run folder; they are found by the hashes that were recorded when they were drawn.

    Args:
        folder: of the run.
        record: of the run when it was opened.
        strips: its thumbnails.
    """

    def __init__(self, folder: Path, record: RunRecord, strips: ThumbnailStrips) -> None:
        self._folder = folder
        self._counts = {"iterations": len(record.scales), "frames": record.frames}
        self._iterations = record.before or record.iterations
        self._thumbnails = lru_cache(_STRIPS_KEPT)(strips.thumbnails)

    def is_removed(self, iteration: int) -> bool:
        """Whether the pictures of an iteration were removed before the edit, see `keep` of `RunFolder.open`."""
        return iteration < len(self._iterations) and self._iterations[iteration].removed

    def find(self, iteration: int, frame: int) -> StayingFrame | None:
        """A frame; of an iteration that was removed it is that of the last. None if it isn't what was written."""
        if iteration >= len(self._iterations):
            return None
        place = len(self._iterations) - 1 if self.is_removed(iteration) else iteration
        path = frame_path(self._folder, place, frame, **self._counts)
        if sha256(path) != self._iterations[place].sha256[frame]:
            return None
        stored = read_frame(path, whole=True)
        return StayingFrame(stored, self._iterations[iteration].sha256[frame]) if stored else None

    def thumbnail(self, iteration: int, frame: int) -> Image.Image:
        """As it is on the contact sheet. Raises RunError: the row doesn't open any more."""
        return self._thumbnails(iteration)[frame]
