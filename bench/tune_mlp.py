"""Chooses the tiles that `kernels/tiles.json` stores: `python -m storyadapter.bench.tune_mlp --write`.

Candidates for the GEGLU and for addition + layer norm are compiled side by side, checked against fp32 and timed on the
layers of SDXL at 1024x1024 with B = 16, beside PyTorch's own ways. Takes about two minutes of one GPU.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.bench.progress import Progress
from storyadapter.bench.tuning import compile_all, exit_code, find_gpu
from storyadapter.method.errors import RunError

if TYPE_CHECKING:
    from storyadapter.bench.mlp_run import Tiles


def build_parser() -> argparse.ArgumentParser:
    """The command's options; imports neither PyTorch nor Triton."""
    parser = argparse.ArgumentParser(
        prog="python -m storyadapter.bench.tune_mlp",
        description="Times tiles of the GEGLU and of addition + layer norm on this GPU; prints a report in Markdown.",
    )
    parser.add_argument(
        "--write", action="store_true", help="store the fastest tiles for this architecture in kernels/tiles.json"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Compiles, measures, prints the report, and stores the winners if asked.

    Raises:
        UnavailableError: no CUDA device, or no Triton.
        RunError: nothing can be stored; the report was printed.
    """
    device = find_gpu()

    from storyadapter.bench.environment import describe
    from storyadapter.bench.mlp_cases import CASES, DTYPE
    from storyadapter.bench.mlp_report import markdown
    from storyadapter.bench.mlp_run import compile_one, measure_case, winners
    from storyadapter.bench.roofline import measure_rates
    from storyadapter.kernels import tiles as tables
    from storyadapter.kernels.launching import capability

    jobs = [(case, tiles) for case in CASES for tiles in case.candidates]
    progress = Progress(1 + len(CASES))
    progress.begin(f"compiling {len(jobs)} candidates")
    refusals = dict(zip(jobs, compile_all(compile_one, jobs), strict=True))
    progress.done(f"{sum(refused is not None for refused in refusals.values())} can't be built here")
    rates = measure_rates(device, DTYPE)
    results = []
    for case in CASES:
        progress.begin(f"{case.operator}, {case.label}")
        of_case = {tiles: refusals[case, tiles] for tiles in case.candidates}
        results.append(measure_case(case, of_case, case.rivals(), device))
        progress.done(", ".join(str(tiles) for tiles in winners(results[-1:]).values()) or "no candidate was measured")
    print(markdown(describe(device), rates, results))
    if args.write:
        write(Path(tables.__file__).with_name("tiles.json"), capability(device), winners(results))


def write(path: Path, capability: int, best: "Mapping[str, Tiles]") -> None:
    """Stores winners; arguments and form as those of `bench.mlp_report.store`.

    Raises:
        RunError: there are none, or the file can't be written.
    """
    from storyadapter.bench.mlp_report import store

    if not best:
        raise RunError("no candidate could be measured here, so nothing is stored; the report says why")
    try:
        store(path, capability, best)
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}; the fastest tiles stand in the report") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 0, 1 (it had to stop) or 2 (it can't be done here).
    """
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
