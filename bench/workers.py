"""`storyadapter-trt bench workers`: one story on one device and on several."""

import argparse
from dataclasses import asdict

from storyadapter.bench.options import add_count, add_engine_options, add_report_options, check_least
from storyadapter.bench.report import check_out, give_report
from storyadapter.method.errors import InputError

HELP = "a story on one device and on several, and several at once on one: how fast, and the same pictures?"
DESCRIPTION = """\
Draws a story with random weights in this process and by several workers on this machine (see run --workers), and sends
stories of as many frames together to a server in this process, one and then all at once; after a warm-up each. Compares
speed and pictures. The engine is built first where the store has none.
"""

MODELS = ("sdxl", "toy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; imports nothing heavy."""
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[2], metavar="N", help="that draw together, numbers (default: 2)"
    )
    add_count(parser, "--stories", 4, "that are sent to the server at once", "M")
    add_count(parser, "--frames", 32, "of the story", "N")
    add_count(parser, "--iterations", 2, "after the text-only one", "K")
    add_count(parser, "--steps", 20, "denoising steps")
    add_count(parser, "--max-frames", 8, "of a batch", "F")
    parser.add_argument(
        "--synthetic-weights", choices=MODELS, default="sdxl", metavar="SIZE", help="sdxl or toy (default: %(default)s)"
    )
    add_engine_options(parser, backend="what runs the networks")
    add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the page, write the files.

    Raises:
        InputError: options that don't fit, or more workers than the machine has GPUs.
        UnavailableError: the backend can't serve here, or Ray isn't installed.
        RunError: a worker was lost too often, or a file can't be written.
    """
    check_least(args, stories=1, frames=args.stories, iterations=0, steps=1, max_frames=1)
    for workers in args.workers:
        if workers < 1:
            raise InputError(f"--workers is {workers}; expected 1 or more")
    check_out(args.out)
    from storyadapter.bench.workers_run import markdown, measure

    found = measure(args)
    give_report(args.out, markdown(found), {"kind": "workers", "version": 2, **asdict(found)})
    return 0
