"""Compiles, checks and times the candidates for the tiles of the GEGLU and the layer norm."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.bench.kernel_run import (
    RIVAL_TOLERANCE,
    TOLERANCE,
    Measured,
    WrongResult,
    measure_contender,
    relative_error,
)
from storyadapter.bench.mlp_cases import DTYPE, Case, Rival
from storyadapter.bench.timing import buffer_sets
from storyadapter.bench.tuning import refusal
from storyadapter.kernels.tiles import GegluTiles, LayerNormTiles

Tiles = GegluTiles | LayerNormTiles

REPEATS: Final = 60
# Long enough that the clocks settle under the power limit: products at full rate run into it.
WARMUP_SECONDS: Final = 0.15
# A compiled kernel serves every M that is a multiple of 16: few rows will do to compile one.
COMPILED_ROWS: Final = 256


@dataclass(frozen=True)
class CaseResult:
    """Every contender on one case, in the order measured; the last rival is the one to beat."""

    case: Case
    rivals: dict[str, Measured]
    candidates: dict[Tiles, Measured]


def compile_one(job: tuple[Case, Tiles]) -> str | None:
    """Compiles a candidate for a case in this process, and says why if it can't be built."""
    case, tiles = job
    few = replace(case, rows=COMPILED_ROWS)
    try:
        few.launch(tiles, *few.kernel_inputs(*few.inputs(torch.device("cuda", 0), 0)))
        torch.cuda.synchronize()
    except Exception as error:
        return refusal(error)
    return None


@torch.no_grad()
def measure_case(
    case: Case,
    refusals: Mapping[Tiles, str | None],
    rivals: Sequence[Rival],
    device: torch.device,
    repeats: int = REPEATS,
) -> CaseResult:
    """Times rivals, then candidates; each is checked against fp32 before it is timed.

    Args:
        case: what is computed.
        refusals: the candidates, each with what `compile_one` said.
        rivals: of the case.
        device: where everything runs.
        repeats: timed regions of each contender.

    Raises:
        WrongResult: a rival computes something else. A candidate that does is refused.
    """
    inputs = [case.inputs(device, seed) for seed in range(buffer_sets(case.bytes_moved, device))]
    measured_rivals = {}
    for rival in rivals:
        calls = [functools.partial(rival.run, *tensors) for tensors in inputs]
        error_of = functools.partial(largest_error, expected=rival.expected(*inputs[0]))
        measured_rivals[rival.name] = measure_contender(
            calls, error_of, RIVAL_TOLERANCE[DTYPE], device, repeats, WARMUP_SECONDS
        )
    error_of = functools.partial(largest_error, expected=case.expected(*inputs[0]))
    kernel_inputs = [case.kernel_inputs(*tensors) for tensors in inputs]
    candidates = {}
    for tiles, refused in refusals.items():
        if refused is not None:
            candidates[tiles] = Measured(None, None, refused)
            continue
        calls = [functools.partial(case.launch, tiles, *tensors) for tensors in kernel_inputs]
        try:
            candidates[tiles] = measure_contender(calls, error_of, TOLERANCE[DTYPE], device, repeats, WARMUP_SECONDS)
        except WrongResult as error:
            candidates[tiles] = Measured(None, None, str(error))
    return CaseResult(case, measured_rivals, candidates)


def largest_error(out: Any, expected: Any) -> float:
    """The largest relative error of one tensor or several; NaN anywhere gives NaN."""
    pairs = zip(_tensors(out), _tensors(expected), strict=True)
    return float(torch.tensor([relative_error(found, right) for found, right in pairs]).max())


def _tensors(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def winners(results: Iterable[CaseResult]) -> dict[str, Tiles]:
    """The fastest candidate of each case, by the key that `tiles.json` keeps it under.

    A case whose candidates were all refused has none.
    """
    found = {}
    for result in results:
        times = {tiles: item.timing.median for tiles, item in result.candidates.items() if item.timing is not None}
        if times:
            found[result.case.key] = min(times, key=times.__getitem__)
    return found
