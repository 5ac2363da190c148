"""Graphs found by address: the first call runs, the second runs and captures, later ones replay."""

import pytest
import torch

from storyadapter.engine.tensorrt.graphs import GraphCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_replays_read_what_lies_at_the_addresses_now() -> None:
    cache, stream = GraphCache(limit=2), torch.cuda.Stream()
    sources = [torch.full((8,), float(index), device="cuda") for index in range(3)]
    result = torch.empty(8, device="cuda")

    def double(source: torch.Tensor) -> float:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cache.run((source.data_ptr(), result.data_ptr()), lambda: torch.mul(source, 2, out=result))
        torch.cuda.current_stream().wait_stream(stream)
        return float(result[0])

    for _ in range(4):
        for index, source in enumerate(sources[:2]):
            assert double(source) == 2 * index
    assert (cache.captures, cache.replays) == (2, 4)
    sources[1].fill_(21)
    assert double(sources[1]) == 42
    # a third pair of addresses takes the place of the graph that was used the longest time ago
    for _ in range(3):
        assert double(sources[2]) == 4
    assert (cache.captures, cache.replays) == (3, 6)
    assert double(sources[1]) == 42
    assert cache.replays == 7
    assert double(sources[0]) == 0
    assert cache.replays == 7
