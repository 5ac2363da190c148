"""Chooses the tiles that `kernels/tiles.json` stores: `python -m storyadapter.bench.tune KERNEL … --write`."""

import argparse
import importlib.util
import sys

from storyadapter.cli.main import Parser, run_program
from storyadapter.kernels.tiles import TABLES
from storyadapter.method.errors import UnavailableError


def build_parser() -> Parser:
    """The command's options; imports neither PyTorch nor Triton."""
    parser = Parser(
        prog="python -m storyadapter.bench.tune",
        description="Compiles candidates for a kernel's tiles side by side, checks them against fp32, times them on "
        "this GPU on layers of SDXL, and prints a report in Markdown. bench kernel then compares the kernels with "
        "their baselines.",
    )
    names = [table.kernel for table in TABLES]
    parser.add_argument("kernels", nargs="+", choices=names, metavar="KERNEL", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--write", action="store_true", help="store the fastest tiles for this architecture in kernels/tiles.json"
    )
    parser.add_argument(
        "--widths", nargs="+", type=int, default=(), metavar="N", help="search these entries alone, such as 128 256"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """See `search.tune`. Raises UnavailableError: no CUDA device, or no Triton."""
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA device here; expected the GPU that the tiles are for")
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("triton is not installed; expected Triton 3.6 or later: pip install triton")
    from storyadapter.bench.kernels import search

    search.tune(args.kernels, torch.device("cuda", 0), write=args.write, widths=args.widths)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(build_parser()))
