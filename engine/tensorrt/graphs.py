"""CUDA graphs of one shape's work, a bounded number of them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import torch

_SEEN_AT_MOST: Final = 64


class GraphCache:
    """Replays work that was run before on the same addresses; holds at most `limit` graphs, the oldest goes first.

    A graph holds the addresses that it was captured with, so it is found by them: inputs needn't be copied anywhere.
    The first call with some addresses just runs; the second runs, then captures; every later one replays.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.captures = 0
        self.replays = 0
        self._graphs: OrderedDict[tuple[int, ...], torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def run(self, addresses: tuple[int, ...], enqueue: Callable[[], None]) -> None:
        """Run `enqueue`'s work on the current stream, which must not be the default one.

        Args:
            addresses: of all that the work reads and writes and that may differ from call to call.
            enqueue: puts the work on the current stream, without a synchronization and without allocating.
        """
        if (graph := self._graphs.get(addresses)) is not None:
            self._graphs.move_to_end(addresses)
            graph.replay()
            self.replays += 1
            return
        enqueue()
        if addresses not in self._seen:
            self._seen[addresses] = None
            if len(self._seen) > _SEEN_AT_MOST:
                self._seen.popitem(last=False)
            return
        del self._seen[addresses]
        if len(self._graphs) >= self.limit:
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            enqueue()
        finally:
            graph.capture_end()
        self._graphs[addresses] = graph
        self.captures += 1
