"""A hash of the sources that shape what a build makes: it stands in an engine's key, instead of a counted version."""

import hashlib
from collections.abc import Iterable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from storyadapter import export

_SUFFIXES = (".py", ".json")
_DIGITS = 12


def sources_digest(names: Iterable[str]) -> str:
    """The hash of these modules and packages; of a package all Python files and tables, also in folders below.

    Args:
        names: such as "storyadapter.model.unet" or "storyadapter.kernels".
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        package, _, last = name.rpartition(".")
        module = resources.files(package) / f"{last}.py"
        files = [(last, module)] if module.is_file() else sorted(_sources(resources.files(name)))
        for path, file in files:
            data = file.read_bytes()
            digest.update(f"{name}\0{path}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()[:_DIGITS]


def export_recipe(*more: str) -> tuple[tuple[str, str], ...]:
    """What in this version of the program decides what is made of an exported file, name and value.

    Args:
        more: modules and packages besides those of the export.
    """
    return ("opset", str(export.OPSET)), ("sources", sources_digest((*export.SOURCES, *more)))


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIXES):
            yield prefix + entry.name, entry
