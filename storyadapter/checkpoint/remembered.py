"""What was found out of a model's files by importing large libraries, remembered for the next process.

To make a network of diffusers or transformers only to learn its tensors' names takes seconds of imports. What comes
out depends on a configuration and on the libraries' versions alone, so it is written down once.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

_FORMAT: Final = 1  # raised, it makes everything that is remembered unknown
_LIBRARIES: Final = ("diffusers", "transformers", "tokenizers", "torch")
_MOST: Final = 200  # files; those used longest ago are forgotten first
_DIGITS: Final = 32
_HASH: Final = 64  # digits of the hash that a file begins with
_LOG = logging.getLogger(__name__)


def user_cache() -> Path:
    """The user's cache folder of this program, `~/.cache/storyadapter-trt` or below `$XDG_CACHE_HOME`; not created."""
    from platformdirs import user_cache_path

    return user_cache_path("storyadapter-trt", appauthor=False)


def digest_of(*parts: Any) -> str:
    """A hash of plain data, bytes among them; 32 hexadecimal digits."""
    from blake3 import blake3

    hasher = blake3()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, separators=(",", ":")).encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:_DIGITS]


def remembered(kind: str, key: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, which is plain data: as it was remembered under this key, or else made and remembered.

    A file that isn't what was written is made again, so is one of other versions of the libraries. Where nothing can be
    written, it is made each time. Processes may do this at once.

    Args:
        kind: what it is, for the file's name.
        key: `digest_of` all that it depends on, besides the libraries.
    """
    from blake3 import blake3

    path = user_cache() / "remembered" / f"{kind}-{digest_of(_FORMAT, _versions(), key)}.json"
    with suppress(OSError, ValueError):
        stored = path.read_bytes()
        data = stored[_HASH:]
        if stored[:_HASH].decode() == blake3(data).hexdigest():
            with suppress(OSError):
                os.utime(path)
            return json.loads(data)
    data = json.dumps(make()).encode()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(blake3(data).hexdigest().encode() + data)
        part.replace(path)
        others = (other for other in path.parent.iterdir() if not other.name.startswith("."))
        for other in sorted(others, key=lambda other: other.stat().st_mtime_ns)[:-_MOST]:
            other.unlink(missing_ok=True)
    except OSError as error:
        _LOG.info("%s can't be written (%s): it is found out again next time", path, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return json.loads(data)


@cache
def _versions() -> list[str]:
    from importlib.metadata import version  # a tenth of the time that --help takes

    return [f"{name} {version(name)}" for name in _LIBRARIES]
