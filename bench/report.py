"""A benchmark's report: how far it is, its tables in Markdown, its files (`--out FILE` gives FILE.md, FILE.json …)."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from storyadapter.cli.printing import one_line, print_result
from storyadapter.method.errors import InputError, RunError


def check_out(out: Path | None) -> None:
    """Make the folder of a report before anything is measured for it.

    Raises:
        InputError: `--out` names no file, or its folder can't be made.
    """
    if out is None:
        return
    if out.name in ("", ".."):
        raise InputError(f"--out {out} names no file; expected such as {out / 'report'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"--out {out}: {out.parent} can't be made: {error.strerror}"
        raise InputError(found, expected="a folder that can be written") from error


def report_file(out: Path, suffix: str) -> Path:
    """FILE and a suffix without its dot; v1.2 is a name, not a name with a suffix."""
    return out.with_name(f"{out.name}.{suffix}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a file is written; raises RunError where it can't be."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror or error}") from error


def give_report(out: Path | None, page: str, data: Any, *, indent: int | None = 1) -> None:
    """Print a page and write the files that were asked for. Raises RunError: it can't be printed, or written."""
    print_result(page)
    write_report(out, page, data, indent=indent)


def write_report(out: Path | None, page: str, data: Any, *, indent: int | None = 1) -> None:
    """Write FILE.md and FILE.json; nothing without `out`. Raises RunError: a file can't be written."""
    if out is None:
        return
    for suffix, text in (("md", page), ("json", json.dumps(data, indent=indent) + "\n")):
        path = report_file(out, suffix)
        with writing(path):
            path.write_text(text, encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table; bars inside cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def opening(title: str, facts: Mapping[str, object], *text: str) -> list[str]:
    """The lines that a page begins with: its title, what it explains, and a table of facts."""
    return [f"# {title}", "", *text, *table(("what", "value"), facts.items()), ""]


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
        print(one_line(line), file=self._stream, flush=True)
