"""CUDA graphs of work that is done again and again on the same memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

import torch

from storyadapter.runtime.streams import capture_stream

GRAPHS_AT_MOST: Final = 4  # a story has two sizes of micro-batches at the most
_SEEN_AT_MOST: Final = 64


class GraphStepRunner:
    """Replays work that was run before under the same key; see `storyadapter.model.networks.StepRunner`.

    The first call with a key runs the work as it is, which also warms it up; the second captures it and replays that;
    every later one replays. At most `limit` graphs are kept, the one that was used the longest time ago goes first.
    Their scratch memory is one pool, as they never run at once: it is as large as the largest graph needs, stays when a
    graph goes, and is given back when the last one goes.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(self, limit: int = GRAPHS_AT_MOST) -> None:
        self.limit = limit
        self.captures = 0
        self.replays = 0
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._side: torch.cuda.Stream | None = None

    @property
    def kept(self) -> int:
        """Graphs that are kept. (No `__len__`: a runner that has none yet would count as false.)"""
        return len(self._graphs)

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`'s work once, in order with the current stream.

        Args:
            key: equal keys mean that `step` does the same work at the same addresses.
            step: puts its work on the current stream without waiting for it; where memory runs out, it may be called
                again, so it must not have changed then what it reads.

        Raises:
            torch.OutOfMemoryError: as `step`; all graphs are gone then.
        """
        try:
            self._run(key, step)
        except torch.OutOfMemoryError:
            self.forget()
            raise

    def forget(self) -> None:
        """Let go of all graphs and their memory; work that is on its way still ends."""
        self._graphs.clear()
        self._seen.clear()

    def _run(self, key: Hashable, step: Callable[[], None]) -> None:
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._seen:
            del self._seen[key]
            while len(self._graphs) >= self.limit:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(step)
        else:
            self._warm_up(step)
            self._seen[key] = None
            if len(self._seen) > _SEEN_AT_MOST:
                self._seen.popitem(last=False)
            return
        self._graphs[key].replay()
        self.replays += 1

    def _warm_up(self, step: Callable[[], None]) -> None:
        """Run on the stream that captures, as libraries keep scratch memory per stream, outside of any capture."""
        try:
            self._run_beside(step)
            return
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self.forget()  # outside of a capture, the memory that the graphs hold serves nobody
        self._run_beside(step)

    def _run_beside(self, step: Callable[[], None]) -> None:
        current, side = torch.cuda.current_stream(), self._stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                step()
        finally:
            current.wait_stream(side)

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        try:
            # The outer one brings the stream back where the end of a capture fails. Other threads may go on with
            # their own work. PyTorch gives unused memory back before it begins.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, stream=self._stream(), capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            # the end of a capture that failed fails too, and hides why
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        self.captures += 1
        return graph

    def _stream(self) -> torch.cuda.Stream:
        if self._side is None:
            self._side = capture_stream()
        return self._side
