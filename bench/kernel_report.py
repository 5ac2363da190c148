"""The kernel benchmark's report: one Markdown table and one JSON file."""

from typing import Any

from storyadapter.bench.kernel_run import (
    KERNEL,
    CaseResult,
    KernelReport,
    fastest_rival,
    roofline_share,
    summary,
)
from storyadapter.bench.markdown import table

_HEADER = (
    "case",
    "B",
    "N",
    "ms",
    "± ms",
    "error",
    "TFLOP/s",
    "MB moved",
    "roofline",
    "limit",
    "fastest rival",
    "its ms",
    "speedup",
)


def _row(report: KernelReport, result: CaseResult) -> list[str]:
    case, ours = result.case, result.measured.get(KERNEL)
    cells = [case.layer.name, str(case.rows), str(case.frames)]
    share, rival = roofline_share(report, result), fastest_rival(result)
    if ours is not None and ours.timing is not None:
        seconds = ours.timing.median / 1e3
        cells += [
            f"{ours.timing.median:.4f}",
            f"{ours.timing.spread:.4f}",
            f"{ours.error:.1e}",
            f"{case.operations / seconds / 1e12:.0f}",
            f"{case.bytes_moved(report.dtype.itemsize) / 1e6:.0f}",
        ]
    else:
        cells += ["-"] * 5
    cells += [f"{share[0]:.0%}", share[1]] if share else ["-", "-"]
    if rival is None:
        return [*cells, "-", "-", "-"]
    cells += [rival[0], f"{rival[1]:.4f}"]
    return [*cells, f"{rival[1] / ours.timing.median:.2f}×" if ours and ours.timing else "-"]


def markdown(report: KernelReport) -> str:
    """The report as Markdown."""
    name = str(report.dtype).removeprefix("torch.")
    lines = [f"# The fused GRCA kernel in {name}", ""]
    lines += table(("what", "value"), [[key, value] for key, value in report.environment.items()]) + [""]
    if report.rates is not None:
        lines += [
            f"Measured limits: matrix products {report.rates.matrix_flops / 1e12:.0f} TFLOP/s, "
            f"exp2 {report.rates.exp2_per_second / 1e12:.2f} T/s, copy {report.rates.copy_bytes / 1e12:.2f} TB/s "
            "(read and written).",
            "",
        ]
    lines += [
        "Time of one layer's call, median and distance between the 10th and 90th percentile. The roofline is the",
        "longest of: operations over unmasked keys at the matrix rate, one exponential per unmasked score at the exp2",
        "rate, each input read once and the output written once at the copy rate. Rivals get expanded, unmasked keys",
        "and values, and that copy is not timed; FlexAttention, compiled anew for every shape, runs at B = 16 only.",
        "",
    ]
    lines += table(_HEADER, [_row(report, result) for result in report.results]) + [""]
    names = list(dict.fromkeys(name for result in report.results for name in result.measured))
    rows = []
    for result in report.results:
        cells = [result.case.layer.name, str(result.case.rows), str(result.case.frames)]
        for contender in names:
            item = result.measured.get(contender)
            cells.append(f"{item.timing.median:.4f}" if item is not None and item.timing is not None else "-")
        rows.append(cells)
    lines += ["## Every contender, milliseconds", ""] + table(("case", "B", "N", *names), rows) + [""]
    refusals = {
        f"{contender}: {item.refusal}"
        for result in report.results
        for contender, item in result.measured.items()
        if item.refusal is not None
    }
    lines += [f"- could not run: {refusal}" for refusal in sorted(refusals)]
    return "\n".join(lines).rstrip() + "\n"


def as_data(report: KernelReport) -> dict[str, Any]:
    """The report as JSON data: everything in the Markdown and the raw lists."""
    results = []
    for result in report.results:
        share = roofline_share(report, result)
        results.append(
            {
                "layer": result.case.layer.name,
                "S": result.case.layer.query_tokens,
                "H": result.case.layer.heads,
                "D": result.case.layer.head_size,
                "B": result.case.rows,
                "N": result.case.frames,
                "operations": result.case.operations,
                "exponentials": result.case.scores,
                "bytes": result.case.bytes_moved(report.dtype.itemsize),
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
        "dtype": str(report.dtype).removeprefix("torch."),
        "rates": None
        if rates is None
        else {
            "matrix_flops": rates.matrix_flops,
            "exp2_per_second": rates.exp2_per_second,
            "copy_bytes_per_second": rates.copy_bytes,
        },
        "summary": summary(report),
        "results": results,
    }
