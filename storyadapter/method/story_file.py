"""Story files: YAML, JSON or plain text, read into plain values that know the lines they stand on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from storyadapter.method.errors import Field, InputError

STORY_SUFFIXES = (".yaml", ".yml", ".json", ".txt")
MAX_BYTES = 1 << 20  # far above any story; keeps a checkpoint named by mistake out of memory
_MEANT_AS_PROMPT = ("if it is meant as a prompt, type ", Field("prompt"), " TEXT")

Place = tuple[Any, ...]


@dataclass(frozen=True)
class StoryFile:
    """What a story file holds, not yet checked.

    Attributes:
        path: where it was read.
        fields: its top-level keys and their values.
        lines: the line, counted from 1, of a key `(key,)` or an item `(key, index or name)`, where it is known.
    """

    path: Path
    fields: Mapping[Any, Any]
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
            return _parse_yaml(path, text)
        case ".json":
            return _parse_json(path, text)
        case _:
            return _parse_lines(path, text)


def kind(value: Any) -> str:
    """A value of YAML, JSON or Python in words, for messages."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"a truth value ({'true' if value else 'false'})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return "text"
        case bytes():
            return "binary data"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file,", expected=f"a story ({', '.join(STORY_SUFFIXES)})", advice=_MEANT_AS_PROMPT
        ) from None
    except IsADirectoryError:
        raise InputError(
            f"{path} is a folder,", expected=f"a story file ({', '.join(STORY_SUFFIXES)})", advice=_MEANT_AS_PROMPT
        ) from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path} is longer than {MAX_BYTES >> 20} MiB, expected a story file ({', '.join(STORY_SUFFIXES)})"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: found the byte 0x{data[error.start]:02x}, expected UTF-8; save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_lines(path: Path, text: str) -> StoryFile:
    # Not splitlines(), which also splits at characters that editors don't count as line ends.
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    places = {("prompts", index): number for index, number in enumerate(lines)}
    return StoryFile(path, {"prompts": list(lines.values())}, places)


def _parse_json(path: Path, text: str) -> StoryFile:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{path}: the key {twice!r} stands twice in one mapping, expected once")
        return mapping

    try:
        fields = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise InputError(f"{path}: not a story: {_first_line(error)}") from None
    return StoryFile(path, _mapping(path, fields))


def _parse_yaml(path: Path, text: str) -> StoryFile:
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return StoryFile(path, {})
        lines = _yaml_lines(path, loader, node)
        return StoryFile(path, _mapping(path, loader.construct_document(node)), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = "; put text that holds ': ' in quotes" if "mapping values are not allowed" in str(error.problem) else ""
        raise InputError(f"{path}{place}: not valid YAML: {error.problem or error.context}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{path}, line {line}: not valid YAML: found the character U+{ord(text[error.position]):04X}, "
            "which can't be printed; take it out"
        ) from None
    except (ValueError, RecursionError) as error:  # a date such as 2024-99-99; thousands of brackets
        raise InputError(f"{path}: not a story: {_first_line(error)}; put text in quotes") from None


def _yaml_lines(path: Path, loader: yaml.SafeLoader, root: yaml.Node) -> dict[Place, int]:
    """Lines of the top-level keys and of their items. PyYAML lets a later key replace an earlier one: refused here."""
    lines: dict[Place, int] = {}

    def keys(mapping: yaml.MappingNode, *parent: Any) -> Iterator[tuple[Any, yaml.Node]]:
        for key_node, value_node in mapping.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            place = (*parent, loader.construct_object(key_node))
            line = key_node.start_mark.line + 1
            if place in lines:
                raise InputError(
                    f"{path}, line {line}: the key {place[-1]!r} stands here and in line {lines[place]}, expected once"
                )
            lines[place] = line
            yield place[-1], value_node

    if isinstance(root, yaml.MappingNode):
        for key, value_node in keys(root):
            if isinstance(value_node, yaml.SequenceNode):
                for index, item in enumerate(value_node.value):
                    lines[key, index] = item.start_mark.line + 1
            elif isinstance(value_node, yaml.MappingNode):
                for _ in keys(value_node, key):
                    pass
    return lines


def _mapping(path: Path, fields: Any) -> Mapping[Any, Any]:
    if not isinstance(fields, dict):
        raise InputError(f"{path}: found {kind(fields)}, expected a mapping with 'prompts:' and a list of prompts")
    return fields


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
