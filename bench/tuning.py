"""What the commands that choose tiles, `bench.tune` and `bench.tune_mlp`, have in common. Imports nothing heavy."""

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from storyadapter.cli.options import typed
from storyadapter.method.errors import StoryAdapterError, UnavailableError

if TYPE_CHECKING:
    import torch

Candidate = TypeVar("Candidate")
Result = TypeVar("Result")

# Each compiling process holds a CUDA context of its own, about half a gigabyte of the GPU's memory.
MAX_PROCESSES: Final = 14


def find_gpu() -> "torch.device":
    """The first CUDA device.

    Raises:
        UnavailableError: there is none, or no Triton.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA device here; expected the GPU that the tiles are for")
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("triton is not installed; expected Triton 3.6 or later: pip install triton")
    return torch.device("cuda", 0)


def compile_all(compile_one: Callable[[Candidate], Result], candidates: Sequence[Candidate]) -> list[Result]:
    """What `compile_one`, a function of a module, gives for each candidate; each process takes some of them.

    The kernels lie in Triton's cache on disk afterwards, where the process that measures finds them.
    """
    workers = min(MAX_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_one, candidates))


def refusal(error: Exception) -> str:
    """Why a candidate can't be built, for a report: a finding, not a failure."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command; an error that a user can act on is told in one line."""
    try:
        command()
    except StoryAdapterError as error:
        print(f"error: {typed(error)}", file=sys.stderr)
        return error.exit_code
    return 0
