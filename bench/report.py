"""A benchmark's report: its tables in Markdown, and its files: `--out FILE` gives FILE.md, FILE.json and others."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        raise InputError(
            f"--out {out}: {out.parent} can't be made: {error.strerror}; expected a folder that can be written"
        ) from error


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


def write_report(out: Path | None, page: str, data: Any, *, indent: int | None = 1) -> None:
    """Write FILE.md and FILE.json; nothing without `out`.

    Raises:
        RunError: a file can't be written.
    """
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
