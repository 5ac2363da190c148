"""What the server counts, under the names that servers of generative models use."""

import time
from collections import deque
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX: Final = "storyadapter:"
_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_WINDOW: Final = 60.0  # seconds over which the rate of rows is taken


class Metrics:
    """One server's; `text` is what Prometheus reads."""

    def __init__(self, gpu_price: float | None = None) -> None:
        self._registry = CollectorRegistry()
        self._price = gpu_price
        self._recent: deque[tuple[float, int]] = deque()
        self._filled = (0, 0)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=_SECONDS, registry=self._registry)

        self.running = gauge("num_requests_running", "Stories that are being drawn")
        self.waiting = gauge("num_requests_waiting", "Stories that wait")
        self.finished = counter("request_success", "Stories by how they ended", "finished_reason")
        self.latency = histogram("e2e_request_latency_s", "From acceptance to the end of a story")
        self.queued = histogram("request_queue_time_s", "From acceptance to the beginning of a story")
        self.frames = counter("frames", "Frames that were drawn")
        self.rows = counter("unet_rows", "Rows of UNet calls")
        self.batch_frames = counter("batch_frames", "Frames in batches")
        self.batch_room = counter("batch_room", "Frames that these batches had room for")
        self.device_seconds = counter("device_seconds", "Seconds that devices worked, by stage", "stage")
        self.memory = gauge("memory_bytes", "Bytes of the GPU held by this process, or of the process without one")
        self.restarts = gauge("worker_restarts", "Workers that were lost and begun again")
        self.cost = counter("cost", "Money, in the unit of the price of a GPU's hour")

    def drew_rows(self, rows: int) -> None:
        """UNet rows were drawn."""
        now = time.monotonic()
        self.rows.inc(rows)
        self._recent.append((now, rows))
        while self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def rate(self) -> float:
        """UNet rows per second, lately; 0 where nothing is known."""
        if len(self._recent) < 2:
            return 0.0
        return sum(rows for _, rows in self._recent) / max(1e-3, time.monotonic() - self._recent[0][0])

    def filled(self, frames: int, room: int) -> None:
        """So many frames were given to workers so far, in batches that had room for so many."""
        self.batch_frames.inc(frames - self._filled[0])
        self.batch_room.inc(room - self._filled[1])
        self._filled = (frames, room)

    def worked(self, stage: str, seconds: float) -> None:
        """Devices worked on a stage."""
        self.device_seconds.labels(stage).inc(seconds)
        if self._price is not None:
            self.cost.inc(self.price(seconds) or 0.0)

    def price(self, seconds: float) -> float | None:
        """What so many seconds of a device cost; None where its price isn't known."""
        return None if self._price is None else seconds / 3600 * self._price

    def text(self) -> bytes:
        return generate_latest(self._registry)
