"""What the runtime asks of a place where frames are kept."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from storyadapter.method.events import FrameFinished


@dataclass(frozen=True, eq=False)
class StoredFrame:
    """A frame that was drawn before: the key of the job that drew it; its embedding, a tensor [width] fp32 on the CPU,
    or None; its picture; its latents, a tensor [4, h, w] fp16 on the CPU, or None; and whether it was decoded again,
    see `FrameFinished`."""

    key: str
    embedding: Any
    picture: Callable[[], Image.Image]
    latents: Any = None
    decoded_again: bool = False

    @property
    def given(self) -> Any:
        """What the next iteration gets of it: its embedding, or the picture where that is missing."""
        return self.picture() if self.embedding is None else self.embedding


class FrameStore(Protocol):
    """Frames of one story. A frame counts as kept when `save`'s future is done, whatever happens to the process then.

    All methods are called from one thread.
    """

    @property
    def stays(self) -> Collection[int]:
        """Frames that an edit leaves as they are, whichever jobs drew them; none where all of the story is drawn."""
        ...

    def kept_from(self) -> int:
        """The first iteration whose frames are kept: those before it are finished, and their frames were removed."""
        ...

    def find(self, iteration: int, frame: int, key: str) -> StoredFrame | None:
        """The frame at this place, if it is kept, whole, and was drawn by the job of this key; one that stays
        was drawn by any, and where those of its iteration were removed, it is that of the last."""
        ...

    def split(self, iteration: int) -> Sequence[int] | None:
        """How an iteration that was begun before was split into batches; None where that isn't known."""
        ...

    def begin_iteration(self, iteration: int, split: Sequence[int]) -> None:
        """The iteration is about to be drawn in batches of so many frames; called again when they are halved."""
        ...

    def save(self, frame: FrameFinished) -> Future[None]:
        """Keep a frame; returns before that is done.

        The future raises RunError where it can't be kept.
        """
        ...

    def finish_iteration(
        self, iteration: int, seconds: Mapping[str, float], split: Sequence[int], decoded_again: Sequence[int] = ()
    ) -> None:
        """All frames of an iteration are kept."""
        ...
