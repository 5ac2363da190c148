"""Frames of one story in memory, for benchmarks that write no folder."""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future

from PIL import Image

from storyadapter.method.events import FrameFinished
from storyadapter.runtime.frame_store import StoredFrame


class FrameMemory:
    """A `FrameStore` that keeps every frame; `stays`: frames of a story that was drawn before, which an edit leaves."""

    def __init__(self) -> None:
        self.stays: Collection[int] = ()
        self._frames: dict[tuple[int, int], StoredFrame] = {}

    def pictures(self, iteration: int) -> list[Image.Image]:
        """Of an iteration, in story order."""
        return [self._frames[place].picture() for place in sorted(self._frames) if place[0] == iteration]

    def kept_from(self) -> int:
        return 0

    def find(self, iteration: int, frame: int, key: str) -> StoredFrame | None:
        found = self._frames.get((iteration, frame))
        return found if found is not None and (frame in self.stays or found.key == key) else None

    def split(self, iteration: int) -> Sequence[int] | None:
        return None

    def begin_iteration(self, iteration: int, split: Sequence[int]) -> None: ...

    def save(self, frame: FrameFinished) -> Future[None]:
        stored = StoredFrame(frame.key, frame.embedding, lambda: frame.picture, frame.latents)
        self._frames[frame.iteration, frame.frame] = stored
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def finish_iteration(
        self, iteration: int, seconds: Mapping[str, float], split: Sequence[int], decoded_again: Sequence[int] = ()
    ) -> None: ...
