"""Files that are either whole or not there, and the lock that keeps two writers out of one folder."""

import errno
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.method.errors import Field, InputError, RunError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_NAME = ".lock"
ANOTHER_FOLDER = ("choose another folder with ", Field("out"))

# The disk is full, the user's quota is used up, or the process's file size limit is reached.
_NO_SPACE = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}
_NUMPYS = re.compile(r"problem writing element|\d+ requested and \d+ written")
_PYTORCHS = re.compile("PytorchStreamWriter|write failed|iostream error|unexpected pos")
_FULL = 1 << 16  # bytes: with fewer a disk is full, as it was when some were given back
_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name in the same folder, flush it to the disk, and rename it to `path`.

    A process killed at any moment, or a machine that loses power, leaves the old file or the new one, never a part.

    Raises:
        RunError: no space is left, or the file can't be written; the temporary file is gone, and `path` as it was.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise write_error(path, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """As `write_atomically`, for files that are no part of a run. Raises OSError: it can't be written."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sha256(path: Path) -> str | None:
    """Of a file's bytes, in hexadecimal digits; None if it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def make_folder(path: Path) -> None:
    """Make a folder if it isn't there. Raises RunError: no space is left, or it can't be made."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> RunError:
    """The one line about a file or folder that couldn't be written in the middle of a run."""
    if error.errno in _NO_SPACE:
        return RunError(f"{path}: {_NO_SPACE[error.errno]}", advice=("make room, then go on with ", Field("resume")))
    advice = ("put that right, then go on with ", Field("resume"))
    return RunError(f"{path} can't be written: {error.strerror or error}", advice=advice)


def is_full(error: OSError) -> bool:
    """Whether the disk, the quota or the file size limit is why something couldn't be written."""
    return error.errno in _NO_SPACE


def why_no_room(error: Exception, folder: Path) -> str | None:
    """Why something below `folder` couldn't be written, if that was for lack of room, in the system's words.

    Libraries tell it in words of their own and drop the system's error number, or tell something else that followed
    from it. So it also counts whether the disk is full now.
    """
    seen: BaseException | None = error
    while seen is not None:
        for number in _NO_SPACE:
            if getattr(seen, "errno", None) == number or os.strerror(number) in str(seen):
                return os.strerror(number)
        if _NUMPYS.search(str(seen)) or _PYTORCHS.search(str(seen)):
            return f"no more can be written ({str(seen).splitlines()[0]})"
        seen = seen.__cause__ or seen.__context__
    return os.strerror(errno.ENOSPC) if shutil.disk_usage(folder).free < _FULL else None


def is_part(path: Path) -> bool:
    """Whether `path` has a temporary name of `write_atomically`, which only a killed writer leaves behind."""
    return _PART.fullmatch(path.name) is not None


def lock_folder(folder: Path) -> "FileLock":
    """Take the lock of an existing folder without waiting; `release()` gives it back, as does the process's end.

    Raises:
        InputError: another process holds it, or the folder can't be written.
        RunError: no space is left for the lock file.
    """
    from filelock import FileLock, Timeout  # what only writes files needs no more than Python

    # Not thread-local: the run may be closed by another thread than the one that opened it.
    lock = FileLock(folder / LOCK_NAME, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is in use by another run", advice=("wait until that has ended, or ", ANOTHER_FOLDER)
        ) from None
    except OSError as error:
        if is_full(error):
            raise write_error(folder, error) from error
        raise InputError(f"{folder} can't be written: {error.strerror}", advice=ANOTHER_FOLDER) from error
    return lock


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't flush a folder, and have no need to
            raise
    finally:
        os.close(descriptor)
