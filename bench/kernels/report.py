"""The kernel benchmark's report: a Markdown table per kernel, and one JSON file."""

from typing import Any

from storyadapter.bench.kernels.run import CaseResult, KernelReport
from storyadapter.bench.report import table

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
