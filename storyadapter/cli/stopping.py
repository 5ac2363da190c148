"""How a command is stopped from outside: Ctrl-C, and SIGTERM, which ends it just as tidily."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread, so that locks and the terminal are given back."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
