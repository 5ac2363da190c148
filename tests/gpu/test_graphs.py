"""Graphs found by key: the first call runs, the second captures, every later one replays."""

import gc

import pytest
import torch

from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.runtime.streams import capture_stream, decoding_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_replays_read_what_lies_at_the_addresses_now() -> None:
    runner = GraphStepRunner(limit=2)
    sources = [torch.full((8,), float(index), device="cuda") for index in range(3)]
    result = torch.empty(8, device="cuda")

    def double(source: torch.Tensor) -> float:
        runner((source.data_ptr(), result.data_ptr()), lambda: torch.mul(source, 2, out=result))
        return float(result[0])

    for _ in range(4):
        for index, source in enumerate(sources[:2]):
            assert double(source) == 2 * index
    assert (runner.captures, runner.replays, runner.kept) == (2, 6, 2)
    sources[1].fill_(21)
    assert double(sources[1]) == 42
    # a third key takes the place of the graph that was used the longest time ago
    for _ in range(3):
        assert double(sources[2]) == 4
    assert (runner.captures, runner.replays, runner.kept) == (3, 9, 2)
    assert double(sources[1]) == 42
    assert runner.replays == 10
    assert double(sources[0]) == 0
    assert runner.replays == 10


def test_a_step_is_done_once_however_it_is_run() -> None:
    runner, counter = GraphStepRunner(limit=1), torch.zeros(1, device="cuda")
    for calls in range(1, 6):
        runner("count", lambda: counter.add_(1))
        assert int(counter) == calls


def test_another_stream_is_kept_in_order() -> None:
    runner, stream = GraphStepRunner(limit=1), torch.cuda.Stream()
    source = torch.randn(1024, 1024, device="cuda")
    result = torch.empty_like(source)
    for _ in range(4):
        with torch.cuda.stream(stream):
            source.mul_(1.5)
            runner("square", lambda: torch.matmul(source, source, out=result))
            expected = source @ source
        stream.synchronize()
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2)


def test_graphs_share_their_scratch_memory_and_give_it_back() -> None:
    runner = GraphStepRunner(limit=4)
    source, result = torch.randn(1 << 24, device="cuda"), torch.empty(1 << 24, device="cuda")

    def step() -> None:
        result.copy_((source * 2 + 1).exp())

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    for _ in range(2):
        runner(0, step)
    one = reserved() - before
    assert one > 0
    for key in (1, 2, 3, 4, 5):
        for _ in range(2):
            runner(key, step)
    assert runner.kept == 4
    assert reserved() - before <= 1.5 * one
    runner.forget()
    torch.cuda.synchronize()
    assert reserved() - before == 0


def test_memory_that_does_not_suffice_is_told_and_the_runner_goes_on() -> None:
    runner, result = GraphStepRunner(limit=2), torch.zeros(1, device="cuda")

    def step(size: int) -> None:
        result.add_(torch.ones(size, device="cuda")[0])

    for _ in range(2):
        runner("small", lambda: step(8))
    stream = torch.cuda.current_stream()
    for key in ("large", "small then large"):
        if key != "large":  # the memory doesn't suffice at the capture
            runner(key, lambda: step(8))
        with pytest.raises(torch.OutOfMemoryError):
            runner(key, lambda: step(1 << 44))
        assert torch.cuda.current_stream() == stream
        assert runner.kept == 0
    for _ in range(3):
        runner("small", lambda: step(8))
    assert float(result) == 6


def test_graphs_make_room_for_the_first_run_of_another_shape() -> None:
    runner, counter = GraphStepRunner(limit=2), torch.zeros(1, device="cuda")
    for _ in range(2):
        runner("large", lambda: counter.add_(1))

    def step() -> None:
        if runner.kept:
            raise torch.OutOfMemoryError("the graphs hold it")
        counter.add_(1)

    runner("other", step)
    assert runner.kept == 0
    assert int(counter) == 3


def test_graphs_are_never_captured_on_the_stream_that_decodes() -> None:
    decoding = decoding_stream(torch.device("cuda"))
    assert all(capture_stream() != decoding for _ in range(70))  # PyTorch hands out 32 in turn
    assert decoding_stream(torch.device("cuda", torch.cuda.current_device())) == decoding
