"""SHA-256 of weight files, remembered, so that a run doesn't read 10 GB to find its engine."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any, Final

from filelock import FileLock
from platformdirs import user_cache_path

from storyadapter.method.errors import CheckpointError, can_not_be_read
from storyadapter.output.files import write_whole

MEMORY_NAME: Final = "fingerprints.json"
_VERSION: Final = 1
_MAX_REMEMBERED: Final = 1000  # the oldest are forgotten first
_CHUNK: Final = 4 << 20
_LARGE: Final = 64 << 20  # bytes of a file that is worth a thread of its own: hashing is slower than reading
_LOG = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


def user_cache() -> Path:
    """The user's cache folder of this program, `~/.cache/storyadapter-trt` or below `$XDG_CACHE_HOME`; not created."""
    return user_cache_path("storyadapter-trt", appauthor=False)


def fingerprint_files(
    paths: Iterable[Path], on_progress: OnProgress | None = None, memory: Path | None = None
) -> dict[Path, str]:
    """The SHA-256 of each file, in 64 hexadecimal digits.

    A file is read only if its hash isn't remembered for its resolved path, its size and its time of change. What was
    replaced by other content of the same size under the same time is therefore taken for the old one. Where the
    memory can't be written, the hashes are right all the same, and a warning is logged. Processes may do this at once.

    Args:
        paths: files; two names of one file are read once.
        on_progress: called as (bytes read, bytes to be read) of all files that have to be read, from several threads,
            one at a time; never called when all are remembered.
        memory: the file that remembers; `fingerprints.json` in the user's cache folder if None.

    Raises:
        CheckpointError: a file can't be read, or it changed while it was read.
    """
    memory = memory or user_cache() / MEMORY_NAME
    resolved = {path: path.resolve() for path in paths}
    stamps = {path: _stamp(path) for path in resolved.values()}
    remembered = _read_memory(memory)
    known = {path: digest for path, stamp in stamps.items() if (digest := _recall(remembered, path, stamp))}
    unknown = [path for path in stamps if path not in known]
    total, done = sum(stamps[path][0] for path in unknown), 0
    fresh: dict[Path, str] = {}

    lock, stopped = Lock(), False

    def advance(count: int) -> None:
        nonlocal done, stopped
        with lock:
            if stopped:
                raise CancelledError
            done += count
            stopped = True  # unless what is told of it raises nothing
            if on_progress is not None:
                on_progress(done, total)
            stopped = False

    def add(path: Path) -> None:
        fresh[path] = _hash(path, stamps[path], advance)

    large = [path for path in unknown if stamps[path][0] >= _LARGE]
    try:
        with ThreadPoolExecutor() as pool:
            reading = [pool.submit(add, path) for path in large]
            try:
                for path in unknown:
                    if path not in large:
                        add(path)
                wait(reading, return_when=FIRST_EXCEPTION)
            finally:
                stopped = True  # all are read, or something failed
        for error in (future.exception() for future in reading):
            if error is not None and not isinstance(error, CancelledError):
                raise error
    finally:  # also when the user interrupts: what was read needn't be read again
        if fresh:
            _remember(memory, {path: (stamps[path], digest) for path, digest in fresh.items()})
    return {path: (known | fresh)[real] for path, real in resolved.items()}


def _hash(path: Path, stamp: Stamp, advance: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    bytes_read = 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                bytes_read += count
                advance(count)
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    if _stamp(path) != stamp or bytes_read != stamp[0]:
        raise CheckpointError(f"{path} changed while it was read; wait until it is written completely, then try again")
    return digest.hexdigest()


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    return status.st_size, status.st_mtime_ns


def _recall(remembered: dict[str, Any], path: Path, stamp: Stamp) -> str | None:
    entry = remembered.get(os.fspath(path))
    if not isinstance(entry, dict) or (entry.get("size"), entry.get("mtime_ns")) != stamp:
        return None
    digest = entry.get("sha256")
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
            for path, ((size, mtime_ns), digest) in fresh.items():
                files.pop(os.fspath(path), None)
                files[os.fspath(path)] = {"size": size, "mtime_ns": mtime_ns, "sha256": digest}
            files = dict(list(files.items())[-_MAX_REMEMBERED:])
            write_whole(memory, json.dumps({"version": _VERSION, "files": files}, indent=1).encode())
    except OSError as error:
        _LOG.warning("%s can't be written (%s): the weights will be read again next time", memory, error)
