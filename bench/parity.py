"""`storyadapter-trt bench parity`: a backend's pictures against those of eager in fp32, from the same references."""

import argparse

from storyadapter.bench.options import add_engine_options, add_report_options, check_least
from storyadapter.bench.report import check_out, write_report
from storyadapter.cli.options import add_checkpoint_options
from storyadapter.method import constants
from storyadapter.method.errors import InputError
from storyadapter.method.plan import FRAMES_UNMEASURED

HELP = "a backend's pictures against those of eager in fp32, from the same references"
DESCRIPTION = """\
Draws a story by eager in fp32 and by another backend: each iteration from eager's pictures of the one before, and all
iterations free-running. Exit code 1 if a picture drawn from the same references is further from eager's than half
precision may take it, or if half the λ isn't seen.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; imports nothing heavy."""
    parser.add_argument(
        "--frames", type=int, default=32, metavar="N", help="frames of the story (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=constants.ITERATIONS,
        metavar="K",
        help="iterations after the first (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the story's noise (default: %(default)s)")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=FRAMES_UNMEASURED,
        metavar="F",
        help="frames of a micro-batch at the most (default: %(default)s)",
    )
    text = "what is compared; the engine that build makes by default is built first where the store has none"
    add_engine_options(parser, backend=text)
    add_report_options(parser)
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the story in all ways, print the page, write the files.

    Returns:
        0, or 1 if pictures drawn from the same references are further from eager's than half precision may take them,
        or if a wrong λ is no further than that.

    Raises:
        InputError: options that don't fit together.
        UnavailableError: the backend can't serve here.
        EngineBuildError: its engine can't be built.
        RunError: a frame came out with values that aren't finite, or a file can't be written.
    """
    check_least(args, frames=1, steps=1, iterations=1, max_frames=1)
    from storyadapter.bench.parity_run import as_data, compare, markdown
    from storyadapter.demo.held_out import FRAMES_AT_MOST

    if args.frames > FRAMES_AT_MOST:
        raise InputError(f"--frames is {args.frames}; expected {FRAMES_AT_MOST} or fewer: so many scenes there are")
    check_out(args.out)
    found = compare(args)
    page = markdown(found)
    print(page)
    write_report(args.out, page, as_data(found))
    return 1 if found.problems else 0
