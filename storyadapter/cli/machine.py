"""What this machine has: `doctor`, what it can run and why not the rest, and `engines`, what the engine store holds."""

import argparse
import platform
import shlex
import textwrap
import time
from pathlib import Path

import psutil
import torch

import storyadapter
from storyadapter.cli.options import typed
from storyadapter.cli.reporting import count, print_result
from storyadapter.engine.backend import installed_version
from storyadapter.engine.backends import AUTO, BACKENDS, find_backend
from storyadapter.engine.gpu import driver_version
from storyadapter.engine.opening import why_outdated
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.method.errors import InputError

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")
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
    memory = psutil.virtual_memory().total / 2**30
    lines = [f"machine    {platform.machine()}, {psutil.cpu_count(logical=False)} cores, {memory:.0f} GiB memory"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}      {device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability "
                f"{device.major}.{device.minor}, driver {driver_version()}, CUDA {torch.version.cuda}"
            )
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        lines.append(f"GPU        none that PyTorch can use (it is {built})")
    lines.append("versions   " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    usable = []
    for backend in BACKENDS.values():
        reason = backend.why_unavailable() or backend.why_it_cant_run()
        usable += [] if reason else [backend]
        why = backend.why_it_cant_build()
        served = f"can run what was built elsewhere, not build: {typed(why)}" if why else "can serve"
        lines.append(f"backend    {backend.name}: {backend.purpose}; " + (f"NO: {reason}" if reason else served))
    lines += [f"{heading:<10} {text}" for backend in BACKENDS.values() for heading, text in backend.describe()]
    lines.append(f"default    --backend {find_backend(AUTO).name}")
    store = EngineStore()
    lines += [f"engines    {len(store.scan()[0])} in {store.root}", *engine_table(store)]
    print_result("\n".join(lines))
    return 0 if usable else 1


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
        numerics = "/".join((identity.numerics.precision, *(own for _, own in identity.numerics.exceptions)))
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
