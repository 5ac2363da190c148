"""Stories as YAML or JSON: a mapping, read within bounds, with the line of every key and item."""

import json
import re
import time
from bisect import bisect_right
from typing import Any, Final

import yaml

from storyadapter.method.errors import InputError
from storyadapter.method.story_files.document import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_SECONDS,
    MAX_VALUES,
    Place,
    StoryFile,
    at,
    refuse_twice,
)

_LINED_DEPTH: Final = 3  # a top-level key, an item in it, a key in that
_SPACE = re.compile(r"[ \t\n\r]*")
_STR = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
# what PyYAML's constructors and Python's raise of a value that they can't make: `!!int ""`, 2024-99-99, …
_UNMADE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_yaml(name: str, text: str) -> StoryFile:
    """A YAML file. Raises InputError: bad syntax, a key given twice, a value out of bounds or that can't be made."""
    try:
        loader = _Loader(name, text)
        node = loader.get_single_node()
        if node is None:
            return StoryFile(name, {})
        if _checked(loader, node, {}) > MAX_VALUES:
            raise loader.refusal(f"aliases and merges make more than {MAX_VALUES:,} values of it")
        lines = _yaml_lines(loader, node, ())
        fields = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        advice = "put text that holds ': ' in quotes" if "mapping values are not allowed" in str(error.problem) else ""
        raise InputError(f"{name}{place}: not valid YAML: {error.problem or error.context}", advice=advice) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}, which can't be printed"
        raise InputError(
            f"{at(name, line)}not valid YAML: found the character {character}", advice="take it out"
        ) from None
    except (RecursionError, *_UNMADE) as error:  # aliases within aliases; a set or a mapping that can't be made
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{name}: not a story: {reason}", advice="put text in quotes") from None
    if isinstance(fields, dict):
        fields = {str(key): value for key, value in fields.items()}  # as of 2024-01-01: a date
    return StoryFile(name, fields, lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's, within bounds of depth, values and time."""

    def __init__(self, name: str, text: str) -> None:
        self.file = name
        self._depth = self._values = 0
        self._until = time.monotonic() + MAX_SECONDS
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH:
            raise self.refusal(f"values are nested more than {MAX_DEPTH} deep")
        if self._values > MAX_VALUES:
            raise self.refusal(f"more than {MAX_VALUES:,} values")
        if time.monotonic() > self._until:
            raise self.refusal(f"it takes more than {MAX_SECONDS:g} s to read")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def refusal(self, found: str) -> InputError:
        return InputError(f"{at(self.file, self.line + 1)}{found}", expected="a story")


def _checked(loader: _Loader, node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node becomes when aliases and merges are expanded; its scalars are tried one by one."""
    if id(node) not in known:
        known[id(node)] = 1  # while it is counted: it may hold itself
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in (_STR, _MERGE):
                _try_scalar(loader, node)
        else:
            below = (
                node.value if isinstance(node, yaml.SequenceNode) else [item for pair in node.value for item in pair]
            )
            known[id(node)] += sum(_checked(loader, item, known) for item in below)
    return known[id(node)]


def _try_scalar(loader: _Loader, node: yaml.ScalarNode) -> None:
    where, advice = at(loader.file, node.start_mark.line + 1), "put text in quotes"
    if len(node.value) > MAX_DIGITS:
        found = f"{len(node.value):,} letters that read as {node.tag.rpartition(':')[2]},"
        raise InputError(where + found, expected=f"{MAX_DIGITS} or fewer", advice=advice)
    try:
        loader.construct_object(node)
    except yaml.MarkedYAMLError:
        raise
    except _UNMADE:
        kind = node.tag.rpartition(":")[2]
        raise InputError(f"{where}{node.value!r} can't be read as {kind}", advice=advice) from None


def _yaml_lines(loader: _Loader, node: yaml.Node, place: Place) -> dict[Place, int]:
    """Lines of what is in a node."""
    lines: dict[Place, int] = {}
    if len(place) == _LINED_DEPTH:
        return lines
    if isinstance(node, yaml.SequenceNode) and place:
        for index, item in enumerate(node.value):
            lines[*place, index] = item.start_mark.line + 1
            lines |= _yaml_lines(loader, item, (*place, index))
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
            continue
        name = loader.construct_object(key_node)
        key = (*place, name if place else str(name))
        line = key_node.start_mark.line + 1
        refuse_twice(loader.file, lines, key, line)
        lines[key] = line
        lines |= _yaml_lines(loader, value_node, key)
    return lines


def read_json(name: str, text: str) -> StoryFile:
    """A JSON file. Raises InputError: bad syntax, a key given twice, a value out of bounds."""

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            line = text.count("\n", 0, text.find(digits)) + 1
            found = f"{at(name, line)}a number of {len(digits):,} digits,"
            raise InputError(found, expected=f"{MAX_DIGITS} or fewer", advice="put text in quotes")
        return int(digits)

    decoder = json.JSONDecoder(parse_int=integer)
    try:
        fields = decoder.decode(text)
        return StoryFile(name, fields, _json_lines(name, text, decoder))
    except json.JSONDecodeError as error:
        raise InputError(f"{name}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{name}: values are nested too deep", expected="a story") from None


def _json_lines(name: str, text: str, decoder: json.JSONDecoder) -> dict[Place, int]:
    """Lines of what is in a text that was decoded before."""
    ends = [match.start() for match in re.finditer("\n", text)]
    lines: dict[Place, int] = {}

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too

    def walk(position: int, place: Place) -> int:
        opening = text[position]
        if opening not in "{[" or len(place) == _LINED_DEPTH:
            return decoder.raw_decode(text, position)[1]
        position, index = skip(position + 1), 0
        while text[position] not in "}]":
            key, line = index, bisect_right(ends, position) + 1
            if opening == "{":
                key, position = decoder.raw_decode(text, position)
                position = skip(skip(position) + 1)  # behind the colon
            refuse_twice(name, lines, (*place, key), line)
            lines[*place, key] = line
            if len(lines) > MAX_VALUES:
                raise InputError(f"{at(name, line)}more than {MAX_VALUES:,} values", expected="a story")
            position = skip(walk(position, (*place, key)))
            if text[position] == ",":
                position = skip(position + 1)
            index += 1
        return position + 1

    walk(skip(0), ())
    return lines
