"""How far the device has come, and how long its stages took, without making the host wait for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class StageClock:
    """Seconds by stage.

    On a GPU a stage lasts from one event to another on the stream that is current inside it: nothing waits, and stages
    that overlap each count in full, so that their sum may exceed the wall-clock time. Elsewhere it is wall-clock time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is put on the current stream inside belongs to this stage; one that is raised out of doesn't count."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        first.record(stream)
        yield
        last.record(stream)
        self._spans.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """By stage, so far; waits until the device has finished what was put into stages."""
        for name, first, last in self._spans:
            last.synchronize()
            self._add(name, first.elapsed_time(last) / 1000)
        self._spans.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class DeviceMarks(Generic[Item]):
    """Marks behind the work that is on a stream; tells which of them the device has passed.

    On a CPU work is done when it has been called, so a mark is passed at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: deque[tuple[Item, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        """Marks that weren't told as passed."""
        return len(self._waiting)

    def put(self, item: Item) -> None:
        """A mark behind all work that is on the current stream now."""
        self._waiting.append((item, recorded_event(self._device)))

    def passed(self) -> Iterator[Item]:
        """The marks that were passed since they were last asked for, in the order in which they were put."""
        while self._waiting and is_passed(self._waiting[0][1]):
            yield self._waiting.popleft()[0]


def recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work that is on the current stream now; None on a CPU, where that work is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def is_passed(event: torch.cuda.Event | None) -> bool:
    """Whether the device has come past an event of `recorded_event`; doesn't wait."""
    return event is None or event.query()
