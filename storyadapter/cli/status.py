"""A sign of life on standard error while nothing else is told: while libraries are imported and models are read."""

import os
import sys
import time
from threading import Event, Lock, Thread
from typing import Final

from storyadapter.cli.printing import one_line

_FIRST: Final = 0.1  # seconds; what is refused at once stays a single line
_EVERY: Final = 2.0
_REDRAWN: Final = 0.5  # on a terminal, where the line changes in place
_OFTEN: Final = 20.0  # seconds of one piece of work after which a log file hears less
_SELDOM: Final = 30.0
_COLUMNS: Final = 80  # where the terminal doesn't say


def _columns() -> int:
    """Of the terminal that standard error is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


class Status:
    """Tells what is being done, and for how long: on a terminal in one line that changes, elsewhere a line each time.

    A thread of its own tells it, so `say` costs nothing.
    """

    def __init__(self, text: str, *, in_place: bool) -> None:
        self._in_place = in_place
        self._text, self._since = text, time.monotonic()
        self._told_at, self._told = self._since - _EVERY + _FIRST, ""
        self._drawn = False  # whether the line on the terminal is ours
        self._lock, self._ended = Lock(), Event()
        self._thread = Thread(target=self._tell, name="status", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """What is being done now."""
        with self._lock:
            if text != self._text:
                self._text, self._since = text, time.monotonic()

    def clear(self) -> None:
        """Make room for another line, which is a sign of life too."""
        with self._lock:
            self._clear()
            self._told_at = time.monotonic()

    def close(self) -> None:
        """End it; safe to call twice."""
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def _tell(self) -> None:
        while not self._ended.wait(0.05):
            with self._lock:
                now = time.monotonic()
                seconds = now - self._since
                pause = _EVERY if seconds < _OFTEN else _SELDOM
                if now - self._told_at < (_REDRAWN if self._drawn else _EVERY if self._in_place else pause):
                    continue
                self._told_at = now
                text = f"... {one_line(self._text)}" + (f" ({seconds:.0f} s)" if seconds >= 1 else "")
                if self._in_place:
                    self._write("\r\x1b[K" + text[: _columns() - 1])
                    self._drawn = True
                else:
                    self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):  # it was closed: nobody looks
            self._ended.set()
