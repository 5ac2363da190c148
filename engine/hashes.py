"""Hashes of files: BLAKE3, which is many times faster than SHA-256 and uses all cores."""

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Final

from blake3 import blake3

_CHUNK: Final = 4 << 20
_LARGE: Final = 64 << 20  # bytes of a file that is worth a thread of its own

OnBytes = Callable[[int, int], None]  # bytes read, bytes to be read


def hash_files(paths: Collection[Path], on_bytes: OnBytes | None = None) -> Iterator[tuple[Path, str]]:
    """The BLAKE3 of each file, in 64 hexadecimal digits, as soon as it is known.

    Args:
        on_bytes: called as (bytes read, bytes to be read) of all of them, from several threads, one at a time. What it
            raises ends the reading.

    Raises:
        OSError: a file can't be read; it names the file.
    """
    sizes = {path: path.stat().st_size for path in paths}
    total, done, lock, stopped = sum(sizes.values()), 0, Lock(), False

    def advance(count: int) -> None:
        nonlocal done, stopped
        with lock:
            if stopped:
                raise CancelledError
            done += count
            stopped = True  # unless what is told of it raises nothing
            if on_bytes is not None:
                on_bytes(done, total)
            stopped = False

    def hashed(path: Path) -> str:
        digest, buffer = blake3(max_threads=blake3.AUTO), memoryview(bytearray(_CHUNK))
        try:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    advance(count)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
        return digest.hexdigest()

    with ThreadPoolExecutor() as pool:
        reading = {pool.submit(hashed, path): path for path, size in sizes.items() if size >= _LARGE}
        try:
            for path, size in sizes.items():
                if size < _LARGE:
                    yield path, hashed(path)
            for future in as_completed(reading):
                if not isinstance(error := future.exception(), CancelledError):
                    if error is not None:
                        raise error
                    yield reading[future], future.result()
        finally:
            stopped = True  # all are read, or something failed
