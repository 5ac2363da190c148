"""Runs the cases of the kernel benchmark over every contender, and reports them: a table per kernel, one JSON file."""

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.bench.environment import describe
from storyadapter.bench.kernels.baselines import Baseline
from storyadapter.bench.kernels.cases import REPORTED_ROWS, GrcaCase, KernelCase
from storyadapter.bench.kernels.roofline import Rates, measure_rates
from storyadapter.bench.report import table
from storyadapter.bench.timing import MIN_REPEATS, Timing, buffer_sets, measure
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.launching import interpreted

# Half-precision results may differ from fp32 by this much, ‖out - ref‖ / ‖ref‖.
TOLERANCE: Final = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
# A baseline adds two rounded results and rounds weights its own way: it is checked for meaning, not for precision.
BASELINE_TOLERANCE: Final = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


class WrongResult(RuntimeError):
    """A contender computed something else; nothing was timed."""


@dataclass(frozen=True)
class Measured:
    """One contender on one case: its error against fp32 and its time, or why it could not run."""

    error: float | None
    timing: Timing | None
    refusal: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """All contenders on one case."""

    case: KernelCase  # what was computed
    measured: dict[str, Measured]  # by the contender's name, in the order measured
    parts: frozenset[str] = frozenset()  # those of the contenders that compute only a part: bounds, and no alternatives

    @property
    def ours(self) -> Timing | None:
        """The kernel's time, if it was measured."""
        found = self.measured.get(self.case.operator)
        return None if found is None else found.timing

    @property
    def fastest_baseline(self) -> tuple[str, float] | None:
        """Name and median milliseconds of the fastest contender that is neither the kernel nor a part of it."""
        times = {
            name: item.timing.median
            for name, item in self.measured.items()
            if item.timing is not None and name != self.case.operator and name not in self.parts
        }
        return min(times.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class KernelReport:
    """What `bench kernel` found; `rates` is None on a CPU."""

    environment: dict[str, str]
    dtype: torch.dtype
    rates: Rates | None
    results: list[CaseResult] = field(default_factory=list)

    def roofline_share(self, result: CaseResult) -> tuple[float, str] | None:
        """The kernel's share of the roofline and the limit that sets it."""
        case, ours = result.case, result.ours
        if self.rates is None or ours is None:
            return None
        floors = self.rates.floor_ms(case.operations, case.exponentials, case.bytes_moved(self.dtype.itemsize))
        limit = max(floors, key=floors.__getitem__)
        return floors[limit] / ours.median, limit

    def summary(self) -> dict[str, Any]:
        """The numbers that the project holds itself to: GRCA in fp16 at B = 16."""
        faster: list[float] = []
        shares: dict[str, float] = {}
        for result in self.results:
            case, ours, baseline = result.case, result.ours, result.fastest_baseline
            if not isinstance(case, GrcaCase) or case.rows != REPORTED_ROWS or ours is None:
                continue
            if baseline is not None and case.frames >= 8:
                faster.append(baseline[1] / ours.median)
            share = self.roofline_share(result)
            if share is not None and case.layer.query_tokens == 4096:
                shares[str(case.frames)] = share[0]
        return {
            "speedup_B16_N8_or_more_least": min(faster) if faster else None,
            "speedup_B16_N8_or_more_median": statistics.median(faster) if faster else None,
            "roofline_share_B16_S4096_by_N": shares,
        }


def relative_error(out: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """‖out - expected‖ / ‖expected‖ in fp32, the largest of several tensors; NaN anywhere gives NaN."""
    outs, rights = ((found,) if isinstance(found, Tensor) else found for found in (out, expected))
    pairs = [(found.float(), right.float()) for found, right in zip(outs, rights, strict=True)]
    return float(torch.stack([(found - right).norm() / right.norm() for found, right in pairs]).max())


def compare(
    cases: Iterable[KernelCase], device: torch.device, dtype: torch.dtype, repeats: int, source_commit: str | None
) -> KernelReport:
    """Measures every contender on every case; each is checked against fp32 before it is timed.

    Raises:
        WrongResult: one computes something else.
    """
    rates = measure_rates(device, dtype) if device.type == "cuda" else None
    report = KernelReport(describe(device, source_commit), dtype, rates)
    for case in cases:
        report.results.append(measure_case(case, case.baselines(), device, dtype, repeats))
    return report


@torch.no_grad()
def measure_case(
    case: KernelCase, baselines: Sequence[Baseline], device: torch.device, dtype: torch.dtype, repeats: int
) -> CaseResult:
    """The kernel, where it runs, and the baselines on one case."""
    inputs = [case.inputs(dtype, device, seed) for seed in range(buffer_sets(case.bytes_moved(dtype.itemsize), device))]
    expected = case.expected(*inputs[0])
    measured: dict[str, Measured] = {}
    if device.type == "cuda" or interpreted(grca_kernel):
        calls = [functools.partial(case.run, *case.kernel_inputs(*tensors)) for tensors in inputs]
        measured[case.operator] = measure_contender(
            calls, expected, TOLERANCE[dtype], device, repeats, case.warmup_seconds
        )
    theirs = [case.baseline_inputs(*tensors) for tensors in inputs]
    for baseline in baselines:
        if baseline.cuda_only and device.type != "cuda":
            continue
        calls = [functools.partial(baseline.run, *tensors) for tensors in theirs]
        right = expected if baseline.expected is None else baseline.expected(*inputs[0])
        try:
            measured[baseline.name] = measure_contender(
                calls, right, BASELINE_TOLERANCE[dtype], device, repeats, case.warmup_seconds
            )
        except WrongResult:
            raise
        except RuntimeError as error:  # lack of memory among them
            measured[baseline.name] = Measured(None, None, str(error).splitlines()[0][:160])
    return CaseResult(case, measured, frozenset(item.name for item in baselines if item.expected is not None))


def measure_contender(
    calls: Sequence[Callable[[], Any]],
    expected: Tensor | tuple[Tensor, ...],
    tolerance: float,
    device: torch.device,
    repeats: int = MIN_REPEATS,
    warmup_seconds: float = 0.05,
) -> Measured:
    """Checks one contender, then times it.

    Args:
        calls: the same work over different sets of buffers.
        expected: what the first call has to give.
        tolerance: the largest relative error that is right.
        device, repeats, warmup_seconds: as of `bench.timing.measure`.

    Raises:
        WrongResult: the error is larger, or NaN.
    """
    errors: list[float] = []

    def check() -> None:
        errors.append(relative_error(calls[0](), expected))
        if not errors[0] <= tolerance:
            raise WrongResult(f"error {errors[0]:.2e} against fp32; expected at most {tolerance:.0e}")

    timing = measure(calls, check, device, repeats=repeats, warmup_seconds=warmup_seconds)
    return Measured(errors[0], timing)


_HEADER = (
    *("ms", "± ms", "error", "TFLOP/s", "MB moved", "roofline", "limit"),
    *("fastest baseline", "its ms", "speedup"),
)


def _row(report: KernelReport, result: CaseResult) -> list[str]:
    case, ours, baseline = result.case, result.ours, result.fastest_baseline
    cells, share = list(case.cells), report.roofline_share(result)
    if ours is not None:
        cells += [
            f"{ours.median:.4f}",
            f"{ours.spread:.4f}",
            f"{result.measured[case.operator].error:.1e}",
            f"{case.operations / ours.median / 1e9:.0f}" if case.operations else "-",
            f"{case.bytes_moved(report.dtype.itemsize) / 1e6:.0f}",
        ]
    else:
        cells += ["-"] * 5
    cells += [f"{share[0]:.0%}", share[1]] if share else ["-", "-"]
    if baseline is None:
        return [*cells, "-", "-", "-"]
    return [*cells, baseline[0], f"{baseline[1]:.4f}", "-" if ours is None else f"{baseline[1] / ours.median:.2f}×"]


def _kernel(report: KernelReport, kernel: str) -> list[str]:
    results = [result for result in report.results if result.case.kernel == kernel]
    columns = results[0].case.columns
    lines = [f"## {kernel}", "", *table((*columns, *_HEADER), [_row(report, result) for result in results]), ""]
    names = list(dict.fromkeys(name for result in results for name in result.measured))
    rows = [[*result.case.cells, *(_milliseconds(result, name) for name in names)] for result in results]
    lines += ["Every contender, milliseconds:", "", *table((*columns, *names), rows), ""]
    refusals = {
        f"- could not run: {name}: {item.refusal}"
        for result in results
        for name, item in result.measured.items()
        if item.refusal is not None
    }
    return lines + ([*sorted(refusals), ""] if refusals else [])


def _milliseconds(result: CaseResult, name: str) -> str:
    item = result.measured.get(name)
    return "-" if item is None or item.timing is None else f"{item.timing.median:.4f}"


def markdown(report: KernelReport) -> str:
    """The report as Markdown."""
    kernels = dict.fromkeys(result.case.kernel for result in report.results)
    lines = [f"# The kernels in {_dtype(report)}: {', '.join(kernels)}", ""]
    lines += table(("what", "value"), list(report.environment.items())) + [""]
    if report.rates is not None:
        lines += [
            f"Measured limits: matrix products {report.rates.matrix_flops / 1e12:.0f} TFLOP/s, "
            f"exp2 {report.rates.exp2_per_second / 1e12:.2f} T/s, copy {report.rates.copy_bytes / 1e12:.2f} TB/s "
            "(read and written).",
            "",
        ]
    lines += [
        "Time of one layer's call, median and distance between the 10th and 90th percentile. The roofline is the",
        "longest of: operations of matrix products (of grca: over unmasked keys) at the matrix rate, one exponential",
        "per unmasked score at the exp2 rate, each input read once and each output written once at the copy rate.",
        "Baselines of grca get expanded, unmasked keys and values, and that copy is not timed; FlexAttention, compiled",
        "anew for every shape, runs at B = 16 only. F.linear alone is a part of the GEGLU: a bound, not a baseline.",
        "",
    ]
    for kernel in kernels:
        lines += _kernel(report, kernel)
    return "\n".join(lines).rstrip() + "\n"


def _dtype(report: KernelReport) -> str:
    return str(report.dtype).removeprefix("torch.")


def as_data(report: KernelReport) -> dict[str, Any]:
    """The report as JSON data: everything in the Markdown and the raw lists."""
    results = []
    for result in report.results:
        case, share = result.case, report.roofline_share(result)
        results.append(
            {
                "kernel": case.kernel,
                **case.as_data(),
                "operations": case.operations,
                "exponentials": case.exponentials,
                "bytes": case.bytes_moved(report.dtype.itemsize),
                "roofline_share": None if share is None else share[0],
                "roofline_limit": None if share is None else share[1],
                "contenders": {
                    name: {"refusal": item.refusal}
                    if item.timing is None
                    else {"error": item.error, **item.timing.as_data()}
                    for name, item in result.measured.items()
                },
            }
        )
    rates = report.rates
    return {
        "environment": report.environment,
        "dtype": _dtype(report),
        "rates": None
        if rates is None
        else {
            "matrix_flops": rates.matrix_flops,
            "exp2_per_second": rates.exp2_per_second,
            "copy_bytes_per_second": rates.copy_bytes,
        },
        "summary": report.summary(),
        "results": results,
    }
