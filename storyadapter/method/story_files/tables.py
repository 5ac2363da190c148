"""Stories as tables: a frame per row, under a header that names the columns."""

import csv
import io
from typing import Any, Final

from storyadapter.method.errors import InputError
from storyadapter.method.story_files.document import MAX_DIGITS, Place, StoryFile, at, excerpt

_DELIMITERS: Final = ",;\t"
# as in a header, in small letters -> what it is of a frame
_COLUMNS: Final = {
    "prompt": "prompt",
    "prompts": "prompt",
    "negative": "negative",
    "negative prompt": "negative",
    "seed": "seed",
    "character": "character",
    "characters": "character",
    "interaction": "interaction",
    "scene": "scene",
    "control": "control 1",
    **{f"control {number}": f"control {number}" for number in range(1, 10)},  # of several ControlNets
}
_PARTS: Final = ("character", "interaction", "scene")  # of a prompt, in the order that the method's authors recommend


def looks_like_table(text: str) -> bool:
    """Whether the first line is a header with columns of a story."""
    first = text.lstrip("\n").partition("\n")[0]
    return any(mark in first for mark in _DELIMITERS) and bool(_known(first, _delimiter(first)))


def read_table(name: str, text: str) -> StoryFile:
    """CSV with `,`, `;` or tabs, whichever makes more of the header known; quotes as spreadsheets write them.

    A prompt is the cell under `prompt`, or else those under `character`, `interaction` and `scene` in this order. With
    `control 2` or more, a frame's control pictures are a list with one per ControlNet.

    Raises:
        InputError: no such columns, one twice, a row with more cells than the header, or quotes that don't end.
    """
    blank = len(text) - len(text.lstrip("\n"))
    header_line = text[blank:].partition("\n")[0]
    reader = csv.reader(io.StringIO(text[blank:], newline=""), delimiter=_delimiter(header_line), strict=True)
    lines: dict[Place, int] = {}
    prompts: list[Any] = []
    header: list[str] = []
    columns: dict[str, int] = {}
    start = blank + 1
    try:
        for row in reader:
            line, start = start, blank + reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header, columns = row, _columns(name, line, row)
                continue
            if any(cell.strip() for cell in row[len(header) :]):
                found = f"{at(name, line)}{len(row)} cells under a header of {len(header)},"
                raise InputError(found, expected="as many", advice="put text that holds the separator in quotes")
            cells = {column: "".join(row[place : place + 1]).strip() for column, place in columns.items()}
            lines["prompts", len(prompts)] = line
            prompts.append(_frame(cells))
    except csv.Error as error:
        raise InputError(f"{at(name, blank + reader.line_num)}not valid CSV: {error}") from None
    used = {*columns.values()} if "prompt" not in columns else {columns[c] for c in columns if c not in _PARTS}
    idle = [excerpt(title.strip(), 30) for place, title in enumerate(header) if place not in used and title.strip()]
    notices = (f"{name}: columns that aren't used: {', '.join(idle[:20])}",) if idle else ()
    return StoryFile(name, {"prompts": prompts}, lines, notices)


def _frame(cells: dict[str, str]) -> dict[str, Any]:
    parts = [cells[part] for part in _PARTS if cells.get(part)]
    frame: dict[str, Any] = {"prompt": cells["prompt"] if "prompt" in cells else " ".join(parts)}
    if cells.get("negative"):
        frame["negative"] = cells["negative"]
    if seed := cells.get("seed"):
        number = seed.isascii() and seed.isdecimal() and len(seed) <= MAX_DIGITS
        frame["seed"] = int(seed) if number else seed
    last = max([int(column.split()[1]) for column in cells if column.startswith("control ")], default=0)
    pictures = [cells.get(f"control {number}") or None for number in range(1, last + 1)]
    if any(pictures):
        frame["control"] = pictures if last > 1 else pictures[0]
    return frame


def _columns(name: str, line: int, header: list[str]) -> dict[str, int]:
    columns: dict[str, int] = {}
    for place, title in enumerate(header):
        column = _COLUMNS.get(_plain(title))
        if column in columns:
            raise InputError(f"{at(name, line)}the column {excerpt(title.strip())} stands twice,", expected="once")
        if column:
            columns[column] = place
    if not columns.keys() & {"prompt", *_PARTS}:
        found = ", ".join(excerpt(title.strip(), 30) for title in header[:10])
        expected = "a header with prompt, or character, interaction and scene; also negative, seed and control"
        raise InputError(f"{at(name, line)}found the columns {found},", expected=expected)
    return columns


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=lambda mark: _known(header, mark))


def _known(header: str, mark: str) -> int:
    return sum(_plain(cell) in _COLUMNS for cell in header.split(mark))


def _plain(title: str) -> str:
    return title.strip().strip('"').strip().casefold().replace("_", " ")
