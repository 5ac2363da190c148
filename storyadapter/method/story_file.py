"""Story files: YAML, JSON or plain text, read into plain values that know the lines they stand on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from storyadapter.method.errors import Field, InputError

STORY_SUFFIXES = (".yaml", ".yml", ".json", ".txt")
MAX_BYTES = 1 << 20  # far above any story; keeps a checkpoint named by mistake out of memory

Place = tuple[Any, ...]


@dataclass(frozen=True)
class StoryFile:
    """What a story file holds, not yet checked."""

    path: Path  # where it was read
    fields: Mapping[Any, Any]  # its top-level keys, as text, and their values
    # the line, counted from 1, of a key `(key,)` or an item `(key, index or name)`, where it is known
    lines: Mapping[Place, int] = field(default_factory=dict)

    def where(self, *place: Any) -> str:
        """The start of an error message: the file, and the line of `place` or of what it stands in."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.lines:
                return f"{self.path}, line {self.lines[place[:end]]}: "
        return f"{self.path}: "


def read_story_file(path: Path) -> StoryFile:
    """Read `.yaml`/`.yml`, `.json`, or plain text (any other name): a prompt per line, blank lines skipped.

    Raises:
        InputError: missing, no file, too long, not UTF-8, bad syntax, a key given twice, or no mapping at the top.
    """
    text = _read_text(path)
    match path.suffix.lower():
        case ".yaml" | ".yml":
            file = _parse_yaml(path, text)
        case ".json":
            file = _parse_json(path, text)
        case _:
            # Not splitlines(), which also splits at characters that editors don't count as line ends.
            prompts = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
            places = {("prompts", index): number for index, number in enumerate(prompts)}
            file = StoryFile(path, {"prompts": list(prompts.values())}, places)
    if not isinstance(file.fields, dict):
        expected = "a mapping with 'prompts:' and a list of prompts"
        raise InputError(f"{path}: found {kind(file.fields)},", expected=expected)
    return file


def kind(value: Any) -> str:
    """A value of YAML, JSON or Python in words, for messages."""
    if isinstance(value, bool):
        return f"a truth value ({'true' if value else 'false'})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    names = {type(None): "nothing", str: "text", bytes: "binary data", dict: "a mapping"}
    names |= dict.fromkeys((list, tuple), "a list")
    return names.get(type(value), f"a {type(value).__name__}")


def _read_text(path: Path) -> str:
    kinds = f"({', '.join(STORY_SUFFIXES)})"
    as_prompt = ("if it is meant as a prompt, type ", Field("prompt"), " TEXT")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file,", expected=f"a story {kinds}", advice=as_prompt) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder,", expected=f"a story file {kinds}", advice=as_prompt) from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is longer than {MAX_BYTES >> 20} MiB,", expected=f"a story file {kinds}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"{path}, line {line}: found the byte 0x{data[error.start]:02x},"
        raise InputError(found, expected="UTF-8", advice="save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_json(path: Path, text: str) -> StoryFile:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise InputError(f"{path}: the key {twice!r} stands twice in one mapping,", expected="once")
        return dict(pairs)

    try:
        return StoryFile(path, json.loads(text, object_pairs_hook=unique))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise InputError(f"{path}: not a story: {_first_line(error)}") from None


def _parse_yaml(path: Path, text: str) -> StoryFile:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = _lines(path, loader, node)
        fields = {} if node is None else loader.construct_document(node)
        if isinstance(fields, dict):
            fields = {str(key): value for key, value in fields.items()}  # as of 2024-01-01: a date
        return StoryFile(path, fields, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        advice = "put text that holds ': ' in quotes" if "mapping values are not allowed" in str(error.problem) else ""
        raise InputError(f"{path}{place}: not valid YAML: {error.problem or error.context}", advice=advice) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}, which can't be printed"
        found = f"{path}, line {line}: not valid YAML: found the character {character}"
        raise InputError(found, advice="take it out") from None
    except (ValueError, RecursionError) as error:  # a date such as 2024-99-99; thousands of brackets
        raise InputError(f"{path}: not a story: {_first_line(error)}", advice="put text in quotes") from None


def _lines(path: Path, loader: yaml.SafeLoader, node: yaml.Node | None, place: Place = ()) -> dict[Place, int]:
    """Lines of the top-level keys and of their items. PyYAML lets a later key replace an earlier one: refused here."""
    if place and isinstance(node, yaml.SequenceNode):
        return {(*place, index): item.start_mark.line + 1 for index, item in enumerate(node.value)}
    lines: dict[Place, int] = {}
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key_node)
        key = (*place, name) if place else (str(name),)
        line = key_node.start_mark.line + 1
        if key in lines:
            found = f"the key {key[-1]!r} stands here and in line {lines[key]},"
            raise InputError(f"{path}, line {line}: {found}", expected="once")
        lines[key] = line
        if not place:
            lines |= _lines(path, loader, value_node, key)
    return lines


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
