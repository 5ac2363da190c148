"""Which form a story file has, by its name or else by its text, and reading it."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from storyadapter.method.errors import Field, InputError
from storyadapter.method.story_files.document import MAX_BYTES, StoryFile, at, excerpt, kind
from storyadapter.method.story_files.lists import fenced_blocks, read_lines
from storyadapter.method.story_files.mappings import read_json, read_yaml
from storyadapter.method.story_files.tables import looks_like_table, read_table
from storyadapter.method.story_files.vistorybench import STORY_NAME, read_vistorybench

STANDARD_INPUT: Final = "-"
_FORMS: Final[dict[str, Callable[[str, str], StoryFile]]] = {"yaml": read_yaml, "json": read_json, "csv": read_table}
_BY_SUFFIX: Final = {
    **{".yaml": "yaml", ".yml": "yaml", ".json": "json", ".csv": "csv", ".tsv": "csv"},
    **{".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", "": "text"},
}
STORY_SUFFIXES: Final = tuple(suffix for suffix in _BY_SUFFIX if suffix)
_STORY: Final = "a story (.yaml, .yml, .json, .csv, .tsv, .txt, .md)"
_LANGUAGES: Final = {"yaml": "yaml", "yml": "yaml", "json": "json", "csv": "csv", "tsv": "csv"}
_YAML_KEY: Final = re.compile(r"^(?:prompts|characters)[ \t]*:(?:[ \t]|$)", re.MULTILINE)
_JSON_KEY: Final = re.compile(r'\s*\{\s*"')
# the first bytes of what people give by mistake
_OTHERS: Final = (
    (b"PK\x03\x04", "a zip archive, as documents of word processors and spreadsheets are"),
    (b"\xd0\xcf\x11\xe0", "an old document of a word processor or a spreadsheet"),
    (b"%PDF", "a PDF"),
    (b"{\\rtf", "rich text"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x1f\x8b", "a gzip archive"),
)


def read_story_file(path: Path | str, language: str = "en") -> StoryFile:
    """Read a story of any form; "-" is standard input.

    Args:
        language: of a folder of ViStoryBench.

    Raises:
        InputError: missing, of another kind, too long, not UTF-8, bad syntax, a key given twice, out of the bounds of
            `document`, or no mapping at the top.
    """
    if str(path) == STANDARD_INPUT:
        name, suffix, data = "standard input", "", _read_standard_input()
    else:
        path = Path(path)
        is_folder, data = _read(path)
        if is_folder:
            return read_vistorybench(path, data, language)
        name, suffix = str(path), path.suffix.lower()
    text = _decoded(name, suffix, data)
    form = _BY_SUFFIX[suffix]
    if form not in _FORMS or text.lstrip().startswith(("```", "~~~")):
        file = _read_text(name, text, markdown=form == "markdown")
    else:
        file = _FORMS[form](name, text)
    if not isinstance(file.fields, dict):
        expected = "a mapping with 'prompts:' and a list of prompts"
        raise InputError(f"{name}: found {kind(file.fields)},", expected=expected)
    return file


def _read_text(name: str, text: str, *, markdown: bool) -> StoryFile:
    """Lines, or what else the text is by its looks, which is told."""
    blocks, outside = fenced_blocks(text)
    if len(blocks) > 1:  # as where a chat gives each prompt by itself
        prompts = [" ".join(block.text.split()) for block in blocks]
        lines = {("prompts", n): len(b.text) - len(b.text.lstrip("\n")) + 1 for n, b in enumerate(blocks)}
        told = f"{name}: each of the {len(blocks)} fenced blocks is a prompt; lines left out: {outside}"
        return StoryFile(name, {"prompts": prompts}, lines, (told,))
    inner = blocks[0].text if blocks else text
    form = _LANGUAGES.get(blocks[0].language) if blocks else None
    form = form or _form_by_looks(inner)
    file = _FORMS[form](name, inner) if form else read_lines(name, inner, markdown=markdown or bool(blocks))
    notices = []
    if blocks:
        notices.append(f"{name}: what stands between the fences is read; lines left out: {outside}")
    if form:
        notices.append(f"{name}: read as {form.upper()}, as it looks like that")
    return replace(file, notices=(*notices, *file.notices))


def _form_by_looks(text: str) -> str | None:
    if _JSON_KEY.match(text):
        return "json"
    if looks_like_table(text):
        return "csv"
    return "yaml" if _YAML_KEY.search(text) else None


def _read_standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except (AttributeError, OSError, ValueError) as error:  # there is none, or it is closed
        raise InputError(f"standard input can't be read: {error}") from None


def _read(path: Path) -> tuple[bool, bytes]:
    """Whether it is a folder of ViStoryBench, and the bytes of the story."""
    as_prompt = ("if it is meant as a prompt, type ", Field("prompt"), " TEXT")
    try:
        is_folder = path.is_dir()
        with (path / STORY_NAME if is_folder else path).open("rb") as file:
            return is_folder, file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if path.is_dir():
            expected = f"{_STORY}, or a folder of ViStoryBench, with a {STORY_NAME}"
            raise InputError(f"{path} is a folder,", expected=expected, advice=as_prompt) from None
        raise InputError(f"{path}: no such file,", expected=_STORY, advice=as_prompt) from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}", advice=as_prompt) from error
    except ValueError:  # a zero byte
        raise InputError(f"{excerpt(str(path))} can't be a file's name", advice=as_prompt) from None


def _decoded(name: str, suffix: str, data: bytes) -> str:
    known = next((what for start, what in _OTHERS if data.startswith(start)), None)
    if data.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        known = "a web page"
    if known or suffix not in _BY_SUFFIX:
        found = known or f"a file with the suffix {suffix!r}"
        raise InputError(f"{name} is {found},", expected=_STORY, advice="save the story as one of these")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is longer than {MAX_BYTES >> 20} MiB,", expected=_STORY)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"{at(name, line)}found the byte 0x{data[error.start]:02x},"
        raise InputError(found, expected="UTF-8", advice="save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
