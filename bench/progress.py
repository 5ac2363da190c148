"""How far a benchmark is, and about how long it will go on."""

import sys
import time
from typing import TextIO


class Progress:
    """Prints a line per part that begins and ends.

    Args:
        parts: how many there will be.
        stream: standard error by default.
    """

    def __init__(self, parts: int, stream: TextIO | None = None) -> None:
        self._parts = parts
        self._finished = 0
        self._stream = stream or sys.stderr
        self._started = time.perf_counter()
        self._left_out = 0.0

    def begin(self, name: str) -> None:
        """A part begins. The time left supposes that parts take as long as those before."""
        elapsed = time.perf_counter() - self._started
        left = ""
        if self._finished:
            seconds = max(0.0, elapsed - self._left_out) / self._finished * (self._parts - self._finished)
            left = f", about {seconds:.0f} s left"
        self.tell(f"[{min(self._finished + 1, self._parts)}/{self._parts}, {elapsed:.0f} s{left}] {name}")

    def done(self, found: str) -> None:
        """The part that began has ended."""
        self._finished += 1
        self.tell(f"    {found}")

    def leave_out(self, seconds: float) -> None:
        """Seconds that no other part will take again, such as those of a build."""
        self._left_out += seconds

    def tell(self, line: str) -> None:
        """Anything else, such as what is being loaded."""
        print(line, file=self._stream, flush=True)
