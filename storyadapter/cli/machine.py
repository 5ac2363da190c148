"""What this machine has: `doctor`, what it can run and why not the rest, and `engines`, what the engine store holds."""

import argparse
import platform
import shlex
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import torch

import storyadapter
from storyadapter.cli.options import typed
from storyadapter.cli.printing import json_line, print_result
from storyadapter.cli.reporting import count
from storyadapter.engine.acceptance import Acceptance
from storyadapter.engine.backend import installed_version
from storyadapter.engine.backends import AUTO, BACKENDS, find_backend
from storyadapter.engine.gpu import driver_version
from storyadapter.engine.opening import why_outdated
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.method.errors import InputError, said

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")
DOCTOR_SCHEMA: Final = 1  # of `doctor --json`; raised where a value goes or changes its meaning
_DAY = 86400.0
_GIB = 2**30
_WIDTH = 80
_ROW = "{:<8}  {:<11}  {:<9}  {:<29} {:>8}  {:>5}"
_HEAD = _ROW.format("key", "backend", "numerics", "frames of WxH, references", "size", "used")


def versions(*more: str) -> dict[str, str]:
    """Of this program, Python, and every library that is installed and takes part; `more`: others that are wanted."""
    found = {package: version for package in (*_PACKAGES, *more) if (version := installed_version(package))}
    return {"storyadapter-trt": storyadapter.__version__, "python": platform.python_version(), **found}


def doctor(args: argparse.Namespace) -> int:
    """Print GPU, driver, versions, backends and engines; returns 0 as long as some backend can serve."""
    if args.accept:
        from storyadapter.cli.acceptance import accept_backend

        return accept_backend(args)
    found = look_around()
    store = EngineStore()
    if args.json:
        print_result(json_line(found))
    else:
        print_result("\n".join([*_in_words(found), *engine_table(store)]))
    return 0 if any(backend["serves"] for backend in found["backends"]) else 1


def look_around() -> dict[str, Any]:
    """What this machine has and can do, as JSON values: what `doctor` tells."""
    with warnings.catch_warnings(record=True) as told:  # such as that the driver is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    gpus = []
    for index in range(torch.cuda.device_count() if available else 0):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        gpus.append(
            {"device": f"cuda:{index}", "name": gpu.name, "memory": gpu.total_memory, "compute_capability": capability}
        )
    backends = []
    for backend in BACKENDS.values():
        why = backend.why_unavailable() or backend.why_it_cant_run()
        cant_build = None if why else backend.why_it_cant_build()
        backends.append(
            {
                "name": backend.name,
                "purpose": backend.purpose,
                "serves": why is None,
                "builds": why is None and cant_build is None and backend.builds,
                "why_not": why or (cant_build and typed(cant_build)),
                "more": [list(pair) for pair in backend.describe()],
                "acceptance": _acceptance(backend.acceptance()),
            }
        )
    store = EngineStore()
    return {
        "schema": DOCTOR_SCHEMA,
        "machine": {
            "architecture": platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "memory": psutil.virtual_memory().total,
        },
        "gpus": gpus,
        "driver": driver_version() if gpus else None,
        "cuda": torch.version.cuda,
        "why_no_gpu": None if available else next((said(each.message) for each in told), None),  # type: ignore[arg-type]
        "versions": versions(),
        "backends": backends,
        "default_backend": find_backend(AUTO).name,
        "engines": {"folder": str(store.root), "count": len(store.scan()[0])},
    }


def _acceptance(found: Acceptance | None) -> dict[str, Any] | None:
    if found is None:
        return None
    differences = [f"{name} is {here} here, {there} there" for name, there, here in found.differences]
    return {"record": found.record and str(found.record), "differences": differences}


def _in_words(found: Mapping[str, Any]) -> Iterator[str]:
    machine, cuda = found["machine"], found["cuda"]
    yield f"machine    {machine['architecture']}, {machine['cores']} cores, {machine['memory'] / _GIB:.0f} GiB memory"
    for index, gpu in enumerate(found["gpus"]):
        yield (
            f"GPU {index}      {gpu['name']}, {gpu['memory'] / _GIB:.0f} GiB, compute capability "
            f"{gpu['compute_capability']}, driver {found['driver']}, CUDA {cuda}"
        )
    if not found["gpus"]:
        why = f"; {found['why_no_gpu']}" if found["why_no_gpu"] else ""
        yield f"GPU        none that PyTorch can use (it is {f'built for CUDA {cuda}' if cuda else 'a CPU build'}{why})"
    yield "versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    for backend in found["backends"]:
        why_not = backend["why_not"]
        can = f"can run what was built elsewhere, not build: {why_not}" if why_not else "can serve"
        yield f"backend    {backend['name']}: {backend['purpose']}; " + (can if backend["serves"] else f"NO: {why_not}")
    yield from (f"{heading:<10} {text}" for backend in found["backends"] for heading, text in backend["more"])
    for backend in found["backends"]:
        if acceptance := backend["acceptance"]:
            yield f"accepted   {backend['name']}: {_accepted_in_words(backend['name'], **acceptance)}"
    yield f"default    --backend {found['default_backend']}"
    yield f"engines    {found['engines']['count']} in {found['engines']['folder']}"


def _accepted_in_words(name: str, record: str | None, differences: Sequence[str]) -> str:
    if record:
        return f"on this machine, by {record}"
    others = f", though elsewhere: {'; '.join(differences)}" if differences else ""
    return f"NO{others}; type: storyadapter-trt doctor --accept {name}"


def list_engines(args: argparse.Namespace) -> int:
    """Print a table of the store; returns the exit code. Raises InputError: the store can't be read."""
    store = EngineStore(args.engine_dir)
    print_result("\n".join([f"{count(len(store.scan()[0]), 'engine')} in {store.root}", *engine_table(store)]))
    return 0


def engine_table(store: EngineStore) -> list[str]:
    """The lines of a table of all engines, the last used first, and of all that isn't usable; 80 columns wide.

    Raises:
        InputError: the store can't be read.
    """
    engines, warnings = store.scan()
    lines = [_HEAD] if engines else []
    found = False
    for engine in sorted(engines, key=lambda engine: engine.last_used, reverse=True):
        identity, ranges = engine.identity, engine.ranges
        own = identity.numerics
        others = dict(own.exceptions).keys() | (own.quantizations.keys() - {"denoiser"})
        numerics = "/".join((own.name, *map(own.named, sorted(others))))
        shapes = f"{ranges.max_frames} of {ranges.width}x{ranges.height}, {ranges.max_references}"
        days = int((time.time() - engine.last_used) / _DAY)
        used = f"{days} d" if days else "today"
        lines.append(_ROW.format(engine.key[:8], identity.backend, numerics, shapes, size(engine.bytes), used))
        models = sorted({use.model for use in engine.uses.values()})
        notes = [f"for {', '.join(models)}"] if models else []
        if why := why_outdated(engine):
            found = True
            notes.append(f"outdated: {'; '.join(why)}")
        for note in notes:
            indent = " " * 10
            lines += textwrap.wrap(note, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if found:
        lines += ["build again what is still wanted; to remove what is outdated:", f"  {_command(store)} --outdated"]
    return lines + warnings


def verify_engines(args: argparse.Namespace) -> int:
    """Say of every engine whether it is what was built; returns 1 if one isn't.

    Raises:
        InputError: the store can't be read.
    """
    engines, warnings = EngineStore(args.engine_dir).scan()
    damages = [engine.damage() for engine in engines]
    for engine, damage in zip(engines, damages, strict=True):
        print_result(f"{engine} in {engine.folder}: {damage or 'whole'}")
    print_result("\n".join([*warnings, f"{count(len(engines), 'engine')} read"]))
    return 1 if warnings or any(damages) else 0


def prune_engines(args: argparse.Namespace) -> int:
    """Delete engines by age, size and program version, the least recently used first; returns the exit code.

    Raises:
        InputError: nothing was said of what is to go, or the store can't be read or written.
    """
    store = EngineStore(args.engine_dir)
    if args.older_than is None and args.keep_under is None and not args.outdated:
        raise InputError(
            "engines prune deletes only what it is told to; expected --outdated, --older-than DAYS or --keep-under "
            "GIB, with --dry-run to see first what would go"
        )
    for option, value in (("--older-than", args.older_than), ("--keep-under", args.keep_under)):
        if value is not None and not value >= 0:
            raise InputError(f"{option} is {value:g}; expected 0 or more")
    engines, freed = sorted(store.scan()[0], key=lambda engine: engine.last_used), 0
    total = sum(engine.bytes for engine in engines)
    if args.outdated:
        for folder in store.outdated():
            number = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            freed += _remove(store, folder, number, f"{folder.name[:8]}, of an older version", args.dry_run)

    def goes_anyway(engine: StoredEngine) -> bool:
        old = args.older_than is not None and time.time() - engine.last_used > args.older_than * _DAY
        return old or bool(args.outdated and why_outdated(engine))

    # what goes anyway first: it may make room enough
    for engine in sorted(engines, key=goes_anyway, reverse=True):
        if goes_anyway(engine) or (args.keep_under is not None and total > args.keep_under * _GIB):
            removed = _remove(store, engine.folder, engine.bytes, _words(engine), args.dry_run)
            freed, total = freed + removed, total - removed
    print_result(f"{'would free' if args.dry_run else 'freed'} {size(freed)} in {store.root}; {size(total)} are left")
    return 0


def size(number: int) -> str:
    """ "43 MiB", "1.2 GiB"."""
    return f"{number / 2**20:,.0f} MiB" if number < _GIB else f"{number / _GIB:,.1f} GiB"


def _remove(store: EngineStore, folder: Path, number: int, words: str, dry_run: bool) -> int:
    """Remove a folder and say so; returns the bytes that it freed."""
    if not dry_run and not store.remove(folder):
        print_result(f"kept {words}: it is in use or being built")
        return 0
    print_result(f"{'would remove' if dry_run else 'removed'} {words}, {size(number)}")
    return number


def _words(engine: StoredEngine) -> str:
    models = ", ".join(sorted({use.model for use in engine.uses.values()}))
    return f"{engine}{f' for {models}' if models else ''}"


def _command(store: EngineStore) -> str:
    own = [] if store.root == EngineStore().root else ["--engine-dir", str(store.root)]
    return shlex.join(["storyadapter-trt", "engines", "prune", *own])
