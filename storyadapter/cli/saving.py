"""Frames are written by threads of their own, so that the device never waits for a PNG."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from storyadapter.method.events import FrameFinished
from storyadapter.output.run_folder import RunFolder

_WORKERS: Final = min(4, os.cpu_count() or 1)


class FrameSaver:
    """Writes frames into a run's folder; use it in a `with` statement, at whose end nothing is half-written.

    Args:
        folder: open.
        text: the PNG text chunks of a frame.
    """

    def __init__(self, folder: RunFolder, text: Callable[[FrameFinished], Mapping[str, str]]) -> None:
        self._folder = folder
        self._text = text
        self._workers = ThreadPoolExecutor(_WORKERS, "png")
        self._waiting: deque[tuple[FrameFinished, Future]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frames that no thread has begun with aren't written."""
        self._workers.shutdown(cancel_futures=True)

    def save(self, event: FrameFinished) -> None:
        """Write a frame; returns before that is done."""
        path = (event.iteration, event.frame, event.picture, self._text(event))
        self._waiting.append((event, self._workers.submit(self._folder.save_frame, *path)))

    def saved(self, *, wait: bool = False) -> Iterator[FrameFinished]:
        """The frames that were written since the last call, in their order; with `wait`, all that were given.

        Raises:
            RunError: one can't be written.
        """
        while self._waiting and (wait or self._waiting[0][1].done()):
            event, future = self._waiting.popleft()
            future.result()
            yield event
