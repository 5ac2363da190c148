"""Lack of memory, by whatever exception it is told: libraries have few that are for it. Imports nothing heavy."""

import errno
import re
import resource
from typing import Final

from storyadapter.method.errors import RunError

_WORDS: Final = re.compile(
    "allocate memory|bad_alloc|bad allocation|out of memory|not enough memory|failed to map segment|start new thread"
)
_MIB: Final = 1 << 20
_LEAST: Final = 1536 * _MIB  # of addresses; with fewer PyTorch ends the process, or hangs, while it is imported


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was for lack of memory that something failed, on the host or on a GPU."""
    seen: BaseException | None = error
    while seen is not None:
        out = isinstance(seen, MemoryError) or getattr(seen, "errno", None) == errno.ENOMEM
        if out or _WORDS.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def refuse_small_limit() -> None:
    """Raises RunError where this process may not even have the memory that PyTorch takes, by `ulimit -v`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < _LEAST:
        raise RunError(
            f"this process may use {limit // _MIB:,} MiB of memory (ulimit -v)",
            expected=f"{_LEAST // _MIB:,} MiB or more, which PyTorch alone takes",
        )
