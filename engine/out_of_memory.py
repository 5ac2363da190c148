"""Compiled code that ran out of memory, told from code that failed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def told_as_out_of_memory(device: torch.device) -> Iterator[None]:
    """Inside, an error in whose course a GPU's memory ran out is a `torch.OutOfMemoryError`.

    A package of AOTInductor passes on only that one of its calls failed.
    """
    if device.type != "cuda":
        yield
        return
    before = _times(device)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _times(device) == before:
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def _times(device: torch.device) -> int:
    """How often PyTorch's allocator told that memory ran out."""
    return torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)
