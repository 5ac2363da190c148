"""Work in processes of their own: compilers that end at once when they are stopped, and whose crash is an exception.

A process leads a session and a group: the terminal's Ctrl-C reaches the program alone, which ends the process with all
that it started. It ends by itself, with the same, when the program ends, whatever ended that.
"""

import base64
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Final, Self, TypeVar

from storyadapter.method.errors import StoryAdapterError

Request = TypeVar("Request")
Result = TypeVar("Result")
_KILLED: Final = -9
_LONGEST: Final = 400


class EndedEarly(Exception):
    """A process ended without a result.

    Attributes:
        code: its exit code.
        killed: whether the system killed it, most likely for lack of memory.
        told: what it told last; empty if it told nothing.
        printed: the last error that it printed, or else the last line.
    """

    def __init__(self, code: int, told: dict[str, Any], printed: str) -> None:
        super().__init__(f"exit code {code}: {printed}")
        self.code, self.told, self.printed = code, told, printed
        self.killed = code == _KILLED


class Processes:
    """The processes of one piece of work. When it is left, none of them is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all of them at once, with all that they started, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def run(
        self,
        work: Callable[[Request, Callable[..., None]], Result],
        request: Request,
        on_told: Callable[[dict[str, Any]], None],
    ) -> Result:
        """`work(request, tell)` in a process of its own. May be called from several threads.

        Args:
            work: a function of a module; its result and its request can be pickled, and what it tells, by keyword, is
                plain data.
            on_told: called with what it tells, from one thread at a time.

        Raises:
            StoryAdapterError, OSError: what `work` raised.
            EndedEarly: it raised anything else, or was killed.
            CancelledError: all were stopped before.
        """
        with tempfile.TemporaryFile() as printed:
            with self._lock:
                if self._stopped:
                    raise CancelledError
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    start_new_session=True,
                )
                self._running.append(process)
            assert process.stdin and process.stdout
            told: dict[str, Any] = {}
            with process:
                try:
                    process.stdin.write(pickle.dumps((work, request)))
                    process.stdin.flush()
                    for line in process.stdout:
                        message = json.loads(line)
                        if "result" in message:
                            return pickle.loads(base64.b64decode(message["result"]))
                        if "raised" in message:
                            raise pickle.loads(base64.b64decode(message["raised"]))
                        told = message
                        with self._lock:
                            on_told(told)
                    code = process.wait()
                except BaseException:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    raise
            printed.seek(max(0, printed.seek(0, os.SEEK_END) - 8000))
            raise EndedEarly(code, told, last_error(printed.read().decode(errors="replace")))


def first_error(message: str) -> str:
    """Of an exception's message: its first line, and the first error that the rest tells of."""
    lines = _lines(message)
    told = next((line for line in lines[1:] if _is_error(line)), "")
    return (f"{lines[0]}: {told}" if told else lines[0])[:_LONGEST]


def last_error(output: str) -> str:
    """Of what a process printed that ended early: the last error, or else the last line."""
    lines = _lines(output)
    return next((line for line in reversed(lines) if _is_error(line)), lines[-1])[:_LONGEST]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]


def _is_error(line: str) -> bool:
    # "Fatal Python error: Aborted" says that it ended, not why
    return "error:" in line.lower() and not line.startswith("Fatal Python error")


def _serve() -> None:
    """What a process does: one piece of work, read from standard input."""
    # compilers print; what they print shall not be taken for messages
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        messages.write(json.dumps(message) + "\n")

    def packed(value: object) -> str:
        return base64.b64encode(pickle.dumps(value)).decode()

    try:
        work, request = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_input, daemon=True).start()
        result = work(request, tell)
    except (StoryAdapterError, OSError) as error:
        tell(raised=packed(error))
    else:
        tell(result=packed(result))


def _end_with_input() -> None:
    # not through sys.stdin: a thread that reads there as the interpreter ends makes it abort
    while os.read(0, 4096):
        pass  # nothing follows the request; the end comes when the other end is closed, by whatever
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve()
