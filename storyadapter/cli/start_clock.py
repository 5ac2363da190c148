"""Where the seconds go between typing a command and its first step."""

import time

import psutil


class StartClock:
    """Seconds since this process began, by what was done in them.

    The system tells how long the process has existed; from then on a monotonic clock counts, and nothing is left out:
    the parts sum up to the time from typing to the last mark.

    Attributes:
        seconds: by part, in order; the first, "python", is everything before this clock was made.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds = {"python": max(0.0, time.time() - psutil.Process().create_time())}

    def mark(self, part: str) -> None:
        """What was done since the last mark was this; parts of one name add up."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
