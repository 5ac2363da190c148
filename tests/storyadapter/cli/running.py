"""Commands of the program, and what they leave."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storyadapter.__main__ import main


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Standard output of `--json-log`."""
        return [json.loads(line) for line in self.out.splitlines()]


Type = Callable[..., Done]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    """Every picture of a run, byte by byte."""
    return {name: data for name, data in files(folder).items() if name.endswith((".png", ".gif"))}


def program(words: list[str], out: Path, err: Path) -> None:
    """The program in a process of its own, with standard output and error elsewhere.

    With one thread, as the tests' own process has: another number of threads sums in another order.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        sys.exit(main(words))
