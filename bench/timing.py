"""The one timing core of the project: check first, warm up, rotate buffers, repeat, keep every number.

On a GPU device events are read around whole replays of a CUDA graph (or around single calls where the work can't be
captured), so neither launch gaps of the host nor its clock are in the numbers. Caches are cold because the caller hands
in the same work over several sets of buffers (`buffer_sets`) and consecutive calls take different sets. On a CPU the
same function reads `time.perf_counter`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

MIN_REPEATS = 30
# A region at least this long is hundreds of kernels, so that launches and the clock's ticks average out within it:
# fewer repeats tell its median, and 30 of them would take minutes.
LONG_REGION_MS = 100.0
MIN_LONG_REPEATS = 5
# A timed region shorter than this is lengthened by more calls: events tick in about half a microsecond.
MIN_REGION_MS = 0.5
# Sets of buffers together exceed the cache by this factor, so that a set is evicted before its next turn.
CACHE_FACTOR = 4
MAX_BUFFER_SETS = 64


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, one entry per repeat, in the order measured."""

    milliseconds: tuple[float, ...]  # raw list; an entry is the mean over the calls of one timed region
    calls_per_region: int  # calls between two clock readings
    graph: bool  # the region was one replay of a CUDA graph

    @property
    def median(self) -> float:
        """The median, in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """Distance between the 10th and the 90th percentile, in milliseconds."""
        # "inclusive" lies within what was measured; the default goes beyond it with fewer than 9 repeats
        cuts = statistics.quantiles(self.milliseconds, n=10, method="inclusive")
        return cuts[-1] - cuts[0]

    def as_data(self) -> dict[str, Any]:
        """JSON form, raw list included."""
        return {
            "median_ms": self.median,
            "spread_ms": self.spread,
            "calls_per_region": self.calls_per_region,
            "graph": self.graph,
            "raw_ms": [round(value, 6) for value in self.milliseconds],
        }


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of buffers of that size keep the device's last-level cache cold (at least 2; 2 on a CPU)."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    needed = -(-CACHE_FACTOR * cache // max(bytes_per_set, 1))
    return min(MAX_BUFFER_SETS, max(2, needed))


def measure(
    calls: Sequence[Callable[[], object]],
    check: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = MIN_REPEATS,
    warmup_seconds: float = 0.05,
    graph: bool = True,
    budget_seconds: float | None = None,
) -> Timing:
    """Milliseconds of one call.

    Args:
        calls: the same work over different sets of buffers, taken in turn.
        check: raises if the work's result is wrong; runs before anything is timed.
        repeats: timed regions, at least 30.
        warmup_seconds: how long the work runs untimed beforehand (at least one round over `calls`).
        graph: capture the calls in one CUDA graph and time its replays; False for work that can't be captured. No
            effect on a CPU.
        budget_seconds: stop repeating a region of 100 ms or more after about so long, though not before 5 repeats; a
            shorter region gets all its repeats. By default every region does.

    Raises:
        ValueError: fewer than 30 repeats, or no calls.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats is {repeats}; expected at least {MIN_REPEATS}")
    if not calls:
        raise ValueError("no calls to measure")
    check()
    if device.type != "cuda":
        return _measure_host(calls, repeats, warmup_seconds, budget_seconds)
    with torch.cuda.device(device):
        return _measure_cuda(calls, repeats, warmup_seconds, graph, budget_seconds)


def repeats_within(region_ms: float, repeats: int, budget_seconds: float | None) -> int:
    """How often a region of so many milliseconds is timed where `repeats` were asked for; see `measure`."""
    if budget_seconds is None or region_ms < LONG_REGION_MS:
        return repeats
    return min(repeats, max(MIN_LONG_REPEATS, int(budget_seconds * 1e3 / region_ms)))


def measure_run(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a whole run gives, and its seconds on the host's clock, from an idle device to an idle device.

    For runs of thousands of calls, whose average is in them: they are timed once. Warm up what a run warms up first.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    return run(), now() - start


def _measure_host(
    calls: Sequence[Callable[[], object]], repeats: int, warmup_seconds: float, budget_seconds: float | None
) -> Timing:
    end = time.perf_counter() + warmup_seconds
    for call in calls:
        call()
    while time.perf_counter() < end:
        calls[0]()
    milliseconds: list[float] = []
    while len(milliseconds) < (repeats_within(milliseconds[0], repeats, budget_seconds) if milliseconds else 1):
        call = calls[len(milliseconds) % len(calls)]
        start = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return Timing(tuple(milliseconds), 1, False)


def _measure_cuda(
    calls: Sequence[Callable[[], object]], repeats: int, warmup_seconds: float, graph: bool, budget: float | None
) -> Timing:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a stream of our own: capture needs one, and first calls may synchronize
        for call in calls:
            call()
        side.synchronize()
        single_ms = _elapsed_ms(lambda: [call() for call in calls]) / len(calls)
    torch.cuda.current_stream().wait_stream(side)

    regions: Sequence[Callable[[], object]]
    if graph:
        rounds = max(1, round(MIN_REGION_MS / max(single_ms * len(calls), 1e-3)))
        captured = torch.cuda.CUDAGraph()
        results: list[object] = [None] * len(calls)  # each call's own: one that is reused would stay in the cache
        with torch.cuda.graph(captured):
            for _ in range(rounds):
                for index, call in enumerate(calls):
                    results[index] = call()
        per_region, regions = rounds * len(calls), [captured.replay]
    else:
        per_region, regions = 1, list(calls)

    region_ms = max(_elapsed_ms(regions[0]), 1e-3)
    for index in range(max(len(regions), min(10_000, int(warmup_seconds * 1e3 / region_ms)))):
        regions[index % len(regions)]()
    count = repeats_within(region_ms, repeats, budget)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (start, stop) in enumerate(events):
        start.record()
        regions[index % len(regions)]()
        stop.record()
    torch.cuda.synchronize()
    milliseconds = tuple(start.elapsed_time(stop) / per_region for start, stop in events)
    return Timing(milliseconds, per_region, graph)


def _elapsed_ms(work: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
