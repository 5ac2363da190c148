"""Who uses an engine of the store: which models' weights it was opened with, when last, and whether it is open now.

One small file per model's weights in the engine's folder, whose time of change is that of the last use. Readers need no
right to write: what can't be noted isn't.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from storyadapter.method.errors import RunError
from storyadapter.output.files import write_whole

MANIFEST_NAME: Final = "manifest.json"
ERRORS: Final = "relative_error_against_eager"  # of a build's and a use's details: what a comparison found, by network
_FOLDER: Final = "uses"
_TOUCHED_EVERY: Final = 3600.0  # seconds
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """The weights of one model that an engine was used with."""

    model: str  # names it for people
    last: float  # when it was used last, in seconds since the epoch
    details: Mapping[str, Any]  # what the backend noted of it, as plain data


def read_uses(folder: Path) -> dict[str, Use]:
    """The uses of the engine in `folder` by the weights' key. A file that can't be read is left out."""
    uses = {}
    for path in sorted((folder / _FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            data = json.loads(path.read_bytes())
            uses[path.stem] = Use(str(data["model"]), path.stat().st_mtime, dict(data["details"]))
    return uses


def note_use(folder: Path, weights: str, model: str, details: Mapping[str, Any] | None = None) -> None:
    """Note that the engine in `folder` is used now.

    Args:
        weights: their key.
        model: names it for people.
        details: to be kept; None keeps what there is.
    """
    path, known = folder / _FOLDER / f"{weights}.json", read_uses(folder).get(weights)
    if known is not None and details in (None, known.details):
        if time.time() - known.last > _TOUCHED_EVERY:
            with suppress(OSError):
                os.utime(path)
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"model": model, "details": dict(details or {})}, indent=1).encode())
    except OSError as error:
        _LOG.warning("%s can't be written (%s): that this engine was used with %s isn't noted", path, error, model)


def hold(folder: Path) -> Callable[[], None]:
    """Keep the engine in `folder` from being removed until what is returned is called, or this process ends.

    Raises:
        RunError: it has been removed.
    """
    removed = RunError(f"{folder} was removed by another process; type the same command again")
    try:
        descriptor = os.open(folder / MANIFEST_NAME, os.O_RDONLY)
    except FileNotFoundError:
        raise removed from None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not folder.exists():  # removed while the lock was waited for
        os.close(descriptor)
        raise removed
    return lambda: os.close(descriptor)


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Inside, nobody else begins to hold the engine; gives whether nobody holds it."""
    with open(folder / MANIFEST_NAME, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
