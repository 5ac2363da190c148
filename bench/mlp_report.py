"""What `bench.tune_mlp` found: as Markdown, and in the table of tiles."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from storyadapter.bench.kernel_run import Measured
from storyadapter.bench.markdown import table
from storyadapter.bench.mlp_candidates import words
from storyadapter.bench.mlp_cases import GegluCase
from storyadapter.bench.mlp_run import CaseResult, Tiles, winners
from storyadapter.bench.roofline import Rates


def markdown(environment: Mapping[str, str], rates: Rates | None, results: Sequence[CaseResult]) -> str:
    """The report as Markdown.

    Args:
        environment: from `bench.environment.describe`.
        rates: the device's measured limits; None on a CPU.
        results: one per case.
    """
    lines = ["# Tiles of the GEGLU and of addition + layer norm in float16", ""]
    lines += table(("what", "value"), list(environment.items())) + [""]
    if rates is not None:
        lines += [
            f"Measured limits: matrix products {rates.matrix_flops / 1e12:.0f} TFLOP/s, copy "
            f"{rates.copy_bytes / 1e12:.2f} TB/s (read and written).",
            "",
        ]
    lines += [
        "Time of one layer's call, median and distance between the 10th and 90th percentile, over cold buffers, in",
        "milliseconds. Everything was checked against fp32 before it was timed. `saves` is against the last rival of",
        "a table. TFLOP/s counts the matrix product alone; TB/s each input read and each output written once.",
        "",
    ]
    best = winners(results)
    for result in results:
        lines += _case(result, rates, best.get(result.case.key)) + [""]
    return "\n".join(lines)


def _case(result: CaseResult, rates: Rates | None, best: Tiles | None) -> list[str]:
    case = result.case
    is_product = isinstance(case, GegluCase)
    amount = case.operations if is_product else case.bytes_moved
    limit = None if rates is None else rates.matrix_flops if is_product else rates.copy_bytes
    rival = list(result.rivals.values())[-1]
    contenders = result.rivals | {words(tiles): item for tiles, item in result.candidates.items()}
    rows = [[name, *_cells(item, amount, limit, rival)] for name, item in contenders.items()]
    unit = "TFLOP/s" if is_product else "TB/s"
    lines = [f"## {case.operator}, {case.label}", ""]
    lines += table((case.operator, "ms", "± ms", unit, "of the limit", "saves, ms", "error"), rows) + [""]
    chosen = "none: no candidate could be measured" if best is None else f"{words(best)}: `{json.dumps(asdict(best))}`"
    return [*lines, f"Fastest, for `{case.key}`: {chosen}"]


def _cells(item: Measured, amount: int, limit: float | None, rival: Measured) -> list[str]:
    if item.timing is None or item.error is None:
        return [f"could not run: {item.refusal}", *"-----"]
    per_second = amount / item.timing.median * 1e3
    saves = "-" if rival.timing is None or item is rival else f"{rival.timing.median - item.timing.median:+.4f}"
    return [
        f"{item.timing.median:.4f}",
        f"{item.timing.spread:.4f}",
        _rate(per_second),
        "-" if limit is None else f"{per_second / limit:.0%}",
        saves,
        f"{item.error:.1e}",
    ]


def _rate(per_second: float) -> str:
    tera = per_second / 1e12
    return f"{tera:.0f}" if tera >= 100 else f"{tera:.2f}"


def store(path: Path, capability: int, best: Mapping[str, Tiles]) -> None:
    """Puts winners into the table of tiles, among those of one architecture; everything else stays as it is.

    Args:
        path: of `tiles.json`.
        capability: compute capability, 10·major + minor.
        best: from `winners`.

    Raises:
        OSError: the file can't be read or written.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    for name, tiles in best.items():
        kernel, _, key = name.partition("/")
        data[kernel].setdefault(f"sm_{capability}", {})[key] = asdict(tiles)
    text = re.sub(r"\{[^{}]*\}", lambda entry: " ".join(entry.group().split()), json.dumps(data, indent=2))
    path.write_text(text + "\n", encoding="utf-8")
