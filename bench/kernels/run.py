"""Runs the cases of the kernel benchmark over every contender, and reports them: a table per kernel, one JSON file."""

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.bench.environment import describe
from storyadapter.bench.kernels.baselines import Baseline
from storyadapter.bench.kernels.cases import REPORTED_ROWS, GrcaCase, KernelCase
from storyadapter.bench.kernels.roofline import Rates, measure_rates
from storyadapter.bench.report import opening, table
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

    def as_data(self) -> dict[str, Any]:
        """JSON form."""
        return {"refusal": self.refusal} if self.timing is None else {"error": self.error, **self.timing.as_data()}


@dataclass(frozen=True)
class CaseResult:
    """All contenders on one case."""

    case: KernelCase  # what was computed
    measured: dict[str, Measured]  # by the contender's name, in the order measured
    parts: frozenset[str] = frozenset()  # those of the contenders that compute only a part: bounds, and no alternatives

    @property
    def times(self) -> dict[str, Timing]:
        """Of the contenders that were measured."""
        return {name: item.timing for name, item in self.measured.items() if item.timing is not None}

    @property
    def ours(self) -> Timing | None:
        """The kernel's time, if it was measured."""
        return self.times.get(self.case.operator)

    @property
    def fastest_baseline(self) -> tuple[str, float] | None:
        """Name and median milliseconds of the fastest contender that is neither the kernel nor a part of it."""
        others = {name: time.median for name, time in self.times.items() if name not in self.parts}
        others.pop(self.case.operator, None)
        return min(others.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class KernelReport:
    """What `bench kernel` found; `rates` is None on a CPU."""

    environment: dict[str, str]
    dtype: torch.dtype
    rates: Rates | None
    results: list[CaseResult] = field(default_factory=list)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def roofline_share(self, result: CaseResult) -> tuple[float, str] | None:
        """The kernel's share of the roofline and the limit that sets it."""
        case, ours = result.case, result.ours
        if self.rates is None or ours is None:
            return None
        floors = self.rates.floor_ms(
            case.operations // case.matrix_speed, case.exponentials, case.bytes_moved(self.dtype.itemsize)
        )
        limit = max(floors, key=floors.__getitem__)
        return floors[limit] / ours.median, limit

    def summary(self) -> dict[str, Any]:
        """The numbers that the project holds itself to: GRCA in fp16 at B = 16 and T = 77."""
        faster: list[float] = []
        shares: dict[str, float] = {}
        for result in self.results:
            case, ours, baseline = result.case, result.ours, result.fastest_baseline
            if not isinstance(case, GrcaCase) or (case.rows, case.chunks) != (REPORTED_ROWS, 1) or ours is None:
                continue
            if baseline is not None and case.frames >= 8:
                faster.append(baseline[1] / ours.median)
            share = self.roofline_share(result)
            if share is not None and case.layer.query_tokens == 4096:
                shares[str(case.frames)] = share[0]
        return {
            "speedup_B16_N8_or_more_least": min(faster, default=None),
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
            calls, expected, case.tolerance or TOLERANCE[dtype], device, repeats, case.warmup_seconds
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
    own, best, share = ["-"] * 5, ["-"] * 3, report.roofline_share(result)
    if ours is not None:
        error, rate = result.measured[case.operator].error, case.operations / ours.median / 1e9
        own = [f"{ours.median:.4f}", f"{ours.spread:.4f}", f"{error:.1e}", f"{rate:.0f}" if rate else "-"]
        own.append(f"{case.bytes_moved(report.dtype.itemsize) / 1e6:.0f}")
    if baseline is not None:
        best = [baseline[0], f"{baseline[1]:.4f}", "-" if ours is None else f"{baseline[1] / ours.median:.2f}×"]
    return [*case.cells, *own, *([f"{share[0]:.0%}", share[1]] if share else ["-", "-"]), *best]


def _kernel(report: KernelReport, kernel: str) -> list[str]:
    results = [result for result in report.results if result.case.kernel == kernel]
    columns = results[0].case.columns
    names = list(dict.fromkeys(name for result in results for name in result.measured))
    rows = []
    for result in results:
        times = {name: f"{time.median:.4f}" for name, time in result.times.items()}
        rows.append([*result.case.cells, *(times.get(name, "-") for name in names)])
    told = {(name, item.refusal) for result in results for name, item in result.measured.items() if item.refusal}
    refusals = [f"- could not run: {name}: {refusal}" for name, refusal in sorted(told)]
    lines = [f"## {kernel}", "", *table((*columns, *_HEADER), [_row(report, result) for result in results]), ""]
    lines += ["Every contender, milliseconds:", "", *table((*columns, *names), rows), ""]
    return lines + ([*refusals, ""] if refusals else [])


def markdown(report: KernelReport) -> str:
    """The report as Markdown."""
    kernels, rates = dict.fromkeys(result.case.kernel for result in report.results), report.rates
    lines = opening(f"The kernels in {report.dtype_name}: {', '.join(kernels)}", report.environment)
    if rates is not None:
        lines += [
            f"Measured limits: matrix products {rates.matrix_flops / 1e12:.0f} TFLOP/s, exp2 "
            f"{rates.exp2_per_second / 1e12:.2f} T/s, copy {rates.copy_bytes_per_second / 1e12:.2f} TB/s (read and "
            "written).",
            "",
        ]
    lines += [
        "Time of one layer's call, median and distance between the 10th and 90th percentile. The roofline is the",
        "longest of: operations of matrix products (of grca: over unmasked keys) at the matrix rate, one exponential",
        "per unmasked score at the exp2 rate, each input read once and each output written once at the copy rate.",
        "Baselines of grca get expanded, unmasked keys and values, and that copy is not timed; FlexAttention, compiled",
        "anew for every shape, runs at B = 16 only. F.linear alone is a part of the GEGLU: a bound, not a baseline.",
        "Products of e4m3 operands are held against twice the matrix rate, their baselines have half precision.",
        "",
    ]
    for kernel in kernels:
        lines += _kernel(report, kernel)
    return "\n".join(lines).rstrip() + "\n"


def as_data(report: KernelReport) -> dict[str, Any]:
    """The report as JSON data: everything in the Markdown and the raw lists."""
    results = []
    for result in report.results:
        case, (share, limit) = result.case, report.roofline_share(result) or (None, None)
        results.append(
            {
                "kernel": case.kernel,
                **case.as_data(),
                "operations": case.operations,
                "exponentials": case.exponentials,
                "bytes": case.bytes_moved(report.dtype.itemsize),
                "roofline_share": share,
                "roofline_limit": limit,
                "contenders": {name: item.as_data() for name, item in result.measured.items()},
            }
        )
    rates = None if report.rates is None else asdict(report.rates)
    page = {"environment": report.environment, "dtype": report.dtype_name, "rates": rates}
    return {**page, "summary": report.summary(), "results": results}
