"""The rooms of the house, and that imports point one way: from a room to those below it."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from storyadapter.__main__ import build_parser
from storyadapter.cli.options import option

ROOT = Path(__file__).parent.parent
# Every room with the folders and modules in it, from the top down.
FLOORS = (
    ("storyadapter.__main__",),
    ("storyadapter.bench",),
    ("storyadapter.demo.training",),
    ("storyadapter.cli",),
    ("storyadapter.serve",),
    ("storyadapter.api",),
    ("storyadapter.engine",),
    ("storyadapter.export",),
    ("storyadapter.kernels",),
    ("storyadapter.output",),
    ("storyadapter.runtime",),
    ("storyadapter.quantization",),
    ("storyadapter.checkpoint",),
    ("storyadapter.model",),
    ("storyadapter.method",),
    ("storyadapter.demo",),
    ("storyadapter",),
)
FOLDERS = {"bench": "storyadapter.bench", "engine": "storyadapter.engine", "export": "storyadapter.export"}
FOLDERS |= {"kernels": "storyadapter.kernels", "storyadapter": "storyadapter"}
# those that know the words of the command line
FACES = ("storyadapter.__main__", "storyadapter.bench", "storyadapter.cli", "storyadapter.serve", "storyadapter.api")
FACES += ("storyadapter.demo.training",)
OTHER_PROGRAMS_OPTIONS = {"--gpu-name"}  # ptxas
# the package's own module loads its public names on first use
LAZY = {"storyadapter"}


def floor_of(module: str) -> int | None:
    """The floor of the longest name that the module lies in; None for a module that isn't ours."""
    found = [
        (len(name), floor)
        for floor, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(found)[1] if found else None


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            # `from package import name` may mean a module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_imports_point_downwards() -> None:
    upward = []
    for module, path in modules():
        own = floor_of(module)
        assert own is not None, f"{module} lies in no room"
        if module in LAZY:
            continue
        for line, name in imports(path):
            theirs = floor_of(name)
            if theirs is not None and theirs < own:
                upward.append(f"{path.relative_to(ROOT)}, line {line}: {name}")
    assert upward == []


def test_every_room_is_told_apart() -> None:
    assert floor_of("storyadapter.demo.training.train") < floor_of("storyadapter.demo.judge")
    assert floor_of("storyadapter.runtime.pipeline") < floor_of("storyadapter.model.contract")
    assert floor_of("torch") is None


@pytest.mark.parametrize("package", FOLDERS.values())
def test_rooms_that_are_named_exist(package: str) -> None:
    assert any(module.startswith(package) for module, _ in modules())


def test_no_room_below_the_faces_names_an_option() -> None:
    named = []
    for module, path in modules():
        if module.startswith(FACES):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = {*re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)} - OTHER_PROGRAMS_OPTIONS
                named += [f"{path.relative_to(ROOT)}, line {node.lineno}: {option}" for option in found]
    assert named == []


def test_settings_in_errors_are_called_as_their_options() -> None:
    known = {option for parser in parsers(build_parser()) for option in parser._option_string_actions}
    unknown = []
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name("Field"), args=[ast.Constant(str(name))]) if option(name) not in known:
                    unknown.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {name}")
    assert unknown == []


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)
