"""Chooses the tiles that `kernels/tiles.json` stores: `python -m storyadapter.bench.tune --out tune.json`.

Candidates are compiled side by side, checked against fp32 and timed over the cases below; the winner has the least
geometric mean of its times relative to the best time of each case. It is copied into the table by hand: tiles are data.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.kernel_cases import LAYERS_1024, LAYERS_OTHER, KernelCase, LayerShape, make_inputs
from storyadapter.bench.kernel_run import TOLERANCE, WrongResult, measure_contender, relative_error
from storyadapter.bench.timing import buffer_sets
from storyadapter.bench.tuning import compile_all, exit_code, find_gpu, refusal
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.grca.launch import launch_arguments
from storyadapter.kernels.tiles import GrcaTiles as Tiles
from storyadapter.model.grca import grca

CASES = (
    KernelCase(LAYERS_1024[0], 16, 1),
    KernelCase(LAYERS_1024[0], 16, 16),
    KernelCase(LAYERS_1024[0], 16, 50),
    KernelCase(LAYERS_1024[0], 16, 100),
    KernelCase(LAYERS_1024[1], 16, 16),
    KernelCase(LAYERS_1024[1], 16, 100),
    KernelCase(LAYERS_1024[1], 2, 16),
    KernelCase(LAYERS_OTHER[0], 16, 16),
)
DTYPE = torch.float16


def candidates() -> list[Tiles]:
    """One tile per program over all shapes; several tiles with the queries read ahead; caps on the registers."""
    found = []
    for (block_m, warps), block_n, stages in itertools.product(
        ((64, 4), (128, 4), (128, 8), (256, 16)), (32, 64), (1, 2, 3)
    ):
        found.append(Tiles(block_m, block_n, 1, warps, stages, prefetch=False, heads_first=True))
    for (block_m, warps), tiles, stages, prefetch, cap in itertools.product(
        ((64, 4), (128, 8)), (2, 4, 8), (1, 2), (False, True), (None, 128, 168)
    ):
        found.append(Tiles(block_m, 32, tiles, warps, stages, prefetch, heads_first=False, max_registers=cap))
    return found


def launch(tiles: Tiles, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
    """Output and compiled kernel of one call with the given tiles."""
    out = torch.empty_like(arguments[0])
    grid, positional, keywords = launch_arguments(*arguments, out, tiles)
    return out, grca_kernel[grid](*positional, **keywords)


def compile_one(tiles: Tiles) -> dict[str, Any]:
    """Compiles a candidate in this process (the result lands in Triton's cache on disk) and says what it takes."""
    case = KernelCase(LayerShape("compile", 64, 2), 2, 1)
    try:
        _, compiled = launch(tiles, make_inputs(case, DTYPE, torch.device("cuda"), 0).arguments())
        torch.cuda.synchronize()
    except Exception as error:
        return {"refusal": refusal(error)}
    return {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared_bytes": compiled.metadata.shared}


def measure_one(
    tiles: Tiles, case: KernelCase, expected: torch.Tensor, inputs: list[tuple[torch.Tensor, ...]]
) -> float:
    """Median milliseconds of one candidate on one case."""

    def run(arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return launch(tiles, arguments)[0]

    calls = [functools.partial(run, arguments) for arguments in inputs]
    error_of = functools.partial(relative_error, expected=expected)
    try:
        measured = measure_contender(calls, error_of, TOLERANCE[DTYPE], inputs[0][0].device, warmup_seconds=0.02)
    except WrongResult as error:
        raise WrongResult(f"{tiles} on {case}: {error}") from None
    return measured.timing.median


def run(out: Path) -> None:
    """Compiles, measures, prints the best twenty and writes everything.

    Raises:
        UnavailableError: no CUDA device, or no Triton.
    """
    device = find_gpu()
    tiles = candidates()
    builds = compile_all(compile_one, tiles)
    results = [{"tiles": asdict(item), **build, "ms": []} for item, build in zip(tiles, builds, strict=True)]
    for case in CASES:
        sets = buffer_sets(case.bytes_moved(DTYPE.itemsize), device)
        inputs = [make_inputs(case, DTYPE, device, seed) for seed in range(sets)]
        expected = grca(*inputs[0].to(torch.float32).arguments())
        arguments = [item.arguments() for item in inputs]
        for item, result in zip(tiles, results, strict=True):
            if "refusal" not in result:
                result["ms"].append(measure_one(item, case, expected, arguments))
    measured = [result for result in results if result["ms"]]
    best = [min(result["ms"][index] for result in measured) for index in range(len(CASES))]
    for result in measured:
        ratios = [time / least for time, least in zip(result["ms"], best, strict=True)]
        result["score"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    measured.sort(key=lambda result: result["score"])
    names = [f"{case.layer.name} B={case.rows} N={case.frames}" for case in CASES]
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": describe(device), "cases": names, "results": results}
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    for result in measured[:20]:
        print(f"{result['score']:.3f}", " ".join(f"{time:.4f}" for time in result["ms"]), result["tiles"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 0, or 2 (it can't be done here).
    """
    parser = argparse.ArgumentParser(prog="python -m storyadapter.bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON with every time")
    args = parser.parse_args(arguments)
    return exit_code(lambda: run(args.out))


if __name__ == "__main__":
    sys.exit(main())
