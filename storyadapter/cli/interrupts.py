"""Ctrl-C and SIGTERM: both raise in the main thread, so that locks and the terminal are given back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

# 128 and the signal's number, as shells have it
INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the program like Ctrl-C does, with an exit code of its own."""


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """143 for SIGTERM, 130 for Ctrl-C."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """An interrupt of which a library made an error of its own, as PyTorch's C++ makes a ValueError, is raised as what
    it was: nothing is wrong with the file that was just read."""
    raised: list[KeyboardInterrupt] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if not callable(handler):
                continue

            def keep(number: int, frame: FrameType | None, handler=handler) -> None:
                try:
                    handler(number, frame)
                except KeyboardInterrupt as stop:
                    raised.append(stop)
                    raise

            before[number] = signal.signal(number, keep)
    try:
        yield
    except Exception as error:
        if raised:
            raise raised[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
