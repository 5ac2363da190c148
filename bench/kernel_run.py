"""Runs the cases of the kernel benchmark over every contender."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from storyadapter.bench.environment import describe
from storyadapter.bench.kernel_cases import ExpandedInputs, KernelCase, all_cases, expand, make_inputs, smoke_cases
from storyadapter.bench.rivals import rivals
from storyadapter.bench.roofline import Rates, measure_rates
from storyadapter.bench.timing import MIN_REPEATS, Timing, buffer_sets, measure
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.grca.launch import grca_triton
from storyadapter.kernels.launching import interpreted
from storyadapter.model.grca import grca

Result = TypeVar("Result")

KERNEL = "grca_triton"
# The batch size that the summary speaks of.
REPORTED_ROWS = 16
# Half-precision results may differ from fp32 by this much, ‖out - ref‖ / ‖ref‖.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
# A rival adds two rounded results and rounds weights its own way: it is checked for meaning, not for precision.
RIVAL_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Measured:
    """One contender on one case: its error against fp32 and its time, or why it could not run."""

    error: float | None
    timing: Timing | None
    refusal: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """All contenders on one case."""

    case: KernelCase
    measured: dict[str, Measured]


@dataclass(frozen=True)
class KernelReport:
    """What `bench kernel` found; `rates` is None on a CPU."""

    environment: dict[str, str]
    dtype: torch.dtype
    rates: Rates | None
    results: list[CaseResult] = field(default_factory=list)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖ in fp32; NaN anywhere gives NaN."""
    difference = (out.float() - expected.float()).norm() / expected.float().norm()
    return float(difference)


def compare(
    device: torch.device, dtype: torch.dtype, repeats: int, *, smoke: bool, source_commit: str | None
) -> KernelReport:
    """Measures every contender on every case; each is checked against fp32 before it is timed."""
    rates = measure_rates(device, dtype) if device.type == "cuda" else None
    report = KernelReport(describe(device, source_commit), dtype, rates)
    for case in smoke_cases() if smoke else all_cases():
        report.results.append(_run_case(case, device, dtype, repeats))
    return report


def _run_case(case: KernelCase, device: torch.device, dtype: torch.dtype, repeats: int) -> CaseResult:
    sets = buffer_sets(case.bytes_moved(dtype.itemsize), device)
    inputs = [make_inputs(case, dtype, device, seed) for seed in range(sets)]
    expected = grca(*inputs[0].to(torch.float32).arguments())
    error_of = functools.partial(relative_error, expected=expected)
    measured: dict[str, Measured] = {}
    if device.type == "cuda" or interpreted(grca_kernel):
        calls = [functools.partial(grca_triton, *item.arguments()) for item in inputs]
        measured[KERNEL] = measure_contender(calls, error_of, TOLERANCE[dtype], device, repeats)
    expanded = [expand(case, item) for item in inputs]
    error_by_head = functools.partial(relative_error, expected=expected.transpose(1, 2))
    for rival in rivals():
        if (rival.cuda_only and device.type != "cuda") or (rival.built_per_shape and case.rows != REPORTED_ROWS):
            continue
        calls = [functools.partial(_grad_free, rival.run, item) for item in expanded]
        try:
            measured[rival.name] = measure_contender(calls, error_by_head, RIVAL_TOLERANCE[dtype], device, repeats)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            if isinstance(error, WrongResult):
                raise
            measured[rival.name] = Measured(None, None, str(error).splitlines()[0][:160])
    return CaseResult(case, measured)


class WrongResult(RuntimeError):
    """A contender computed something else; nothing was timed."""


def _grad_free(run: Callable[[ExpandedInputs], Tensor], inputs: ExpandedInputs) -> Tensor:
    with torch.no_grad():
        return run(inputs)


def measure_contender(
    calls: Sequence[Callable[[], Result]],
    error_of: Callable[[Result], float],
    tolerance: float,
    device: torch.device,
    repeats: int = MIN_REPEATS,
    warmup_seconds: float = 0.05,
) -> Measured:
    """Checks one contender, then times it.

    Args:
        calls: the same work over different sets of buffers.
        error_of: relative error of what the first call gives.
        tolerance: the largest error that is right.
        device, repeats, warmup_seconds: as of `bench.timing.measure`.

    Raises:
        WrongResult: the error is larger, or NaN.
    """
    errors: list[float] = []

    def check() -> None:
        errors.append(error_of(calls[0]()))
        if not errors[0] <= tolerance:
            raise WrongResult(f"error {errors[0]:.2e} against fp32; expected at most {tolerance:.0e}")

    timing = measure(calls, check, device, repeats=repeats, warmup_seconds=warmup_seconds)
    return Measured(errors[0], timing)


def fastest_rival(result: CaseResult) -> tuple[str, float] | None:
    """Name and median milliseconds of the fastest contender that is not the kernel."""
    times = {
        name: item.timing.median for name, item in result.measured.items() if name != KERNEL and item.timing is not None
    }
    if not times:
        return None
    name = min(times, key=times.__getitem__)
    return name, times[name]


def speedups(report: KernelReport, keep: Callable[[KernelCase], bool]) -> list[float]:
    """Fastest rival's time over the kernel's, for the cases that `keep` accepts."""
    found = []
    for result in report.results:
        rival, ours = fastest_rival(result), result.measured.get(KERNEL)
        if rival is not None and ours is not None and ours.timing is not None and keep(result.case):
            found.append(rival[1] / ours.timing.median)
    return found


def roofline_share(report: KernelReport, result: CaseResult) -> tuple[float, str] | None:
    """The kernel's share of the roofline and the limit that sets it."""
    ours = result.measured.get(KERNEL)
    if report.rates is None or ours is None or ours.timing is None:
        return None
    floors = report.rates.floor_ms(result.case, report.dtype.itemsize)
    limit = max(floors, key=floors.__getitem__)
    return floors[limit] / ours.timing.median, limit


def summary(report: KernelReport) -> dict[str, Any]:
    """The numbers that the project holds itself to: fp16 at B = 16."""
    faster = speedups(report, lambda case: case.rows == REPORTED_ROWS and case.frames >= 8)
    shares: dict[str, float] = {}
    for result in report.results:
        share = roofline_share(report, result)
        if share is not None and result.case.rows == REPORTED_ROWS and result.case.layer.query_tokens == 4096:
            shares[str(result.case.frames)] = share[0]
    return {
        "speedup_B16_N8_or_more_least": min(faster) if faster else None,
        "speedup_B16_N8_or_more_median": statistics.median(faster) if faster else None,
        "roofline_share_B16_S4096_by_N": shares,
    }
