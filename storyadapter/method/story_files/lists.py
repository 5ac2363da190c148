"""Stories as text: a prompt per line, or a numbered or bulleted list as chats and notes have it."""

import re
from dataclasses import dataclass
from typing import Any, Final

from storyadapter.method.errors import Text
from storyadapter.method.story_files.document import Place, StoryFile, excerpt

_FENCE: Final = re.compile(r" {0,3}(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^`]*")
_NUMBERED: Final = re.compile(
    r"[*_]{0,3}\(?(?:(?:frame|image|page|panel|prompt|scene|shot)[ \t]+)?(?P<number>\d{1,4})[*_]{0,3}"
    r"[.):][*_]{0,3}[ \t]+(?P<text>\S.*)",
    re.IGNORECASE,
)
_BULLETED: Final = re.compile(r"[-*+•◦▪–—][ \t]+(?P<text>\S.*)")
_EMPHASIS: Final = re.compile(r"(\*{1,3}|_{2,3}|`)(?=\S)([^*_`]+)(?<=\S)\1")
_RULE: Final = re.compile(r"(?:[-*_][ \t]*){3,}|#{1,6}(?:[ \t].*)?|={3,}")  # also a heading


@dataclass(frozen=True)
class Block:
    """A fenced block: what its first line says, and its text, with empty lines in place of those before it."""

    language: str
    text: str


def fenced_blocks(text: str) -> tuple[list[Block], int]:
    """The blocks between ``` or ~~~, and how many lines with words stand outside of them."""
    blocks: list[Block] = []
    outside, opened, start = 0, None, 0
    lines = text.split("\n")
    for number, line in enumerate([*lines, None]):
        match = _FENCE.fullmatch(line) if line is not None else None
        if opened is None:
            if match:
                opened, start = match, number + 1
            else:
                outside += bool(line and line.strip())
        elif line is None or (match and not match["language"] and match["mark"].startswith(opened["mark"])):
            blocks.append(Block(opened["language"].lower(), "\n" * start + "\n".join(lines[start:number])))
            opened = None
    return blocks, outside


def read_lines(name: str, text: str, *, markdown: bool) -> StoryFile:
    """A prompt per line, blank lines skipped; of a list, a prompt per item, without its number or bullet.

    A text is a list where at least half of its lines that aren't indented begin as items do, numbers one after the
    other. Lines that are indented go on with the item above them.

    Args:
        markdown: whether headings and rules are no prompts, and emphasis is no part of any.
    """
    # Not splitlines(), which also splits at characters that editors don't count as line ends.
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for _, line in rows), default=0)
    notices: list[Text] = []
    prompts: dict[int, str] = {}
    left_out: list[str] = []
    if items := _items([(number, line[indent:]) for number, line in rows]):
        what, found = items
        last = None
        for number, line in rows:
            if number in found:
                last, prompts[number] = number, found[number]
            elif last is not None and line[indent : indent + 1].isspace():
                bullet = _BULLETED.fullmatch(line.strip())
                prompts[last] += " " + (bullet["text"] if bullet else line.strip())
            else:
                last = None
                left_out.append(line)
        marks = "numbers" if what == "numbered" else "bullets"
        notices.append(f"{name}: read as a {what} list; {marks} and emphasis are no part of the prompts")
    else:
        for number, line in rows:
            if markdown and _RULE.fullmatch(line.strip()):
                left_out.append(line)
            else:
                prompts[number] = line.strip()
    if left_out:
        many = "1 line is" if len(left_out) == 1 else f"{len(left_out)} lines are"
        notices.append(f"{name}: {many} left out as no prompt, first {excerpt(left_out[0].strip())}")
    if items or markdown:
        prompts = {number: _EMPHASIS.sub(r"\2", prompt) for number, prompt in prompts.items()}
    lines: dict[Place, int] = {("prompts", index): number for index, number in enumerate(prompts)}
    return StoryFile(name, {"prompts": list[Any](prompts.values())}, lines, tuple(notices))


def _items(rows: list[tuple[int, str]]) -> tuple[str, dict[int, str]] | None:
    """The items of a list by their lines, and what kind of list it is; None if the text is none."""
    rows = [row for row in rows if not row[1][0].isspace()]
    plain = [row for row in rows if not _RULE.fullmatch(row[1].strip())]
    numbered = [(line, match) for line, text in rows if (match := _NUMBERED.fullmatch(text.rstrip()))]
    numbers = [int(match["number"]) for _, match in numbered]
    if numbers and 2 * len(numbers) >= len(plain) and numbers == [*range(numbers[0], numbers[0] + len(numbers))]:
        return "numbered", {line: match["text"] for line, match in numbered}
    bulleted = [(line, match) for line, text in plain if (match := _BULLETED.fullmatch(text.rstrip()))]
    if bulleted and 2 * len(bulleted) >= len(plain):
        return "bulleted", {line: match["text"] for line, match in bulleted}
    return None
