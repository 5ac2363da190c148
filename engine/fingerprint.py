"""Hashes of weight files, remembered, so that a run doesn't read 10 GB to find its engine."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock

from storyadapter.checkpoint.remembered import user_cache
from storyadapter.engine.hashes import OnBytes, hash_files
from storyadapter.method.errors import CheckpointError, can_not_be_read
from storyadapter.output.files import write_whole

MEMORY_NAME: Final = "fingerprints.json"
_VERSION: Final = 2
_MAX_REMEMBERED: Final = 1000  # the oldest are forgotten first
_LOG = logging.getLogger(__name__)

# Size in bytes, and the times of the last change in ns: of the content, which anybody may set, and of anything at all,
# which nobody may.
Stamp = tuple[int, int, int]
_STAMP: Final = ("size", "mtime_ns", "ctime_ns")


class Fingerprints(NamedTuple):
    """Hashes of files, in 64 hexadecimal digits each, and which of the files weren't read to know it."""

    digests: dict[Path, str]
    remembered: frozenset[Path]


def fingerprint_files(
    paths: Iterable[Path], on_bytes: OnBytes | None = None, memory: Path | None = None, *, anew: bool = False
) -> Fingerprints:
    """The BLAKE3 of each file.

    A file is read only if its hash isn't remembered for its resolved path, its size and its times. Bytes that changed
    on the disk itself, under the system, are therefore not seen; `anew` sees them. Where the memory can't be written,
    the hashes are right all the same, and a warning is logged. Processes may do this at once.

    Args:
        paths: files; two names of one file are read once.
        on_bytes: as of `hash_files`, for those that have to be read; never called when all are remembered.
        memory: the file that remembers; `fingerprints.json` in the user's cache folder if None.
        anew: read all of them.

    Raises:
        CheckpointError: a file can't be read, or it changed while it was read.
    """
    memory = memory or user_cache() / MEMORY_NAME
    resolved = {path: path.resolve() for path in paths}
    stamps = {path: _stamp(path) for path in resolved.values()}
    entries = _read_memory(memory)
    remembered = {path: digest for path, stamp in stamps.items() if (digest := _recall(entries, path, stamp))}
    known = {} if anew else remembered
    fresh: dict[Path, str] = {}
    try:
        for path, digest in hash_files([path for path in stamps if path not in known], on_bytes):
            if _stamp(path) != stamps[path]:
                advice = "wait until it is written completely, then try again"
                raise CheckpointError(f"{path} changed while it was read", advice=advice)
            fresh[path] = digest
    except OSError as error:
        raise CheckpointError(can_not_be_read(Path(error.filename), error)) from error
    finally:  # also when the user interrupts: what was read needn't be read again
        if new := {path: digest for path, digest in fresh.items() if remembered.get(path) != digest}:
            _remember(memory, {path: (stamps[path], digest) for path, digest in new.items()})
    return Fingerprints({path: (known | fresh)[real] for path, real in resolved.items()}, frozenset(known))


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _recall(remembered: dict[str, Any], path: Path, stamp: Stamp) -> str | None:
    entry = remembered.get(os.fspath(path))
    if not isinstance(entry, dict) or tuple(map(entry.get, _STAMP)) != stamp:
        return None
    digest = entry.get("blake3")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _read_memory(memory: Path) -> dict[str, Any]:
    """Path to entry; empty where there is none, or none that can be read: all of it can be found out again."""
    try:
        data = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("files"), dict):
        return {}
    return data["files"]


def _remember(memory: Path, fresh: dict[Path, tuple[Stamp, str]]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        # Others may have added to it since it was read.
        with FileLock(memory.with_name(f".{memory.name}.lock")):
            files = _read_memory(memory)
            for path, (stamp, digest) in fresh.items():
                files.pop(os.fspath(path), None)
                files[os.fspath(path)] = {**dict(zip(_STAMP, stamp, strict=True)), "blake3": digest}
            files = dict(list(files.items())[-_MAX_REMEMBERED:])
            write_whole(memory, json.dumps({"version": _VERSION, "files": files}, indent=1).encode())
    except OSError as error:
        _LOG.warning("%s can't be written (%s): the weights will be read again next time", memory, error)
