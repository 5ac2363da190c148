"""`storyadapter-trt bench soak`: many stories in one process, and a run that is killed and resumed."""

import argparse

from storyadapter.bench.options import add_engine_options, add_report_options, check_least, refuse_checkpoint_options
from storyadapter.bench.report import check_out, write_report
from storyadapter.cli.options import add_checkpoint_options
from storyadapter.method.errors import InputError
from storyadapter.model.contract import check_pixels

HELP = "many stories in one process, and a run that is killed: memory must not grow, pictures must not change"
DESCRIPTION = """\
Draws many stories of random length, size and seed in one process. Every third is the first one again: its pictures must
be the same each time, and the memory in use after it must not grow. Then a run is killed at random moments, and resumed
each time: its pictures must be those of a run without a stop, and no more frames may be drawn again than were under
way. Exit code 1 if one of these fails.
"""

MODELS = ("sdxl", "toy")
_STORIES = 24
_KILLS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; imports nothing heavy."""
    length = parser.add_argument_group("how long (whatever ends first)")
    length.add_argument(
        "--stories", type=int, metavar="N", help=f"stories, 9 or more (default: {_STORIES}, without --minutes)"
    )
    length.add_argument("--minutes", type=float, metavar="M", help="no new story after so long")
    parser.add_argument(
        "--kills",
        type=int,
        metavar="N",
        help=f"how often a run is killed and resumed (default: {_KILLS}, none with --synthetic-weights)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of stories and moments (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of each (default: %(default)s)")
    parser.add_argument(
        "--max-references",
        type=int,
        default=6,
        metavar="N",
        help="frames of a story at the most (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=3,
        metavar="F",
        help="frames of a micro-batch at the most (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        metavar="PIXELS,…",
        help="heights and widths to choose from, ascending (default: half, three quarters and all of the model's own, "
        "or that and the next larger for a tiny one)",
    )
    parser.add_argument(
        "--synthetic-weights",
        choices=MODELS,
        metavar="SIZE",
        help="random weights instead of the demo model: sdxl (full size) or toy",
    )
    add_engine_options(parser, backend="what runs the networks; its engine is built first where the store has none")
    add_report_options(parser)
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the stories, print the page, write the files.

    Returns:
        0, or 1 if memory grew or a repeated story gave other pictures.

    Raises:
        InputError: options that don't fit together.
        UnavailableError: the backend can't serve here.
        RunError: a frame came out with values that aren't finite, or a file can't be written.
    """
    check_least(args, stories=9, steps=1, max_references=1, max_frames=1, kills=0)
    for pixels in args.sizes or ():
        check_pixels("sizes", pixels)
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes is {args.minutes:g}; expected more than 0")
    if args.synthetic_weights:
        refuse_checkpoint_options(args, "--synthetic-weights")
        if args.kills:
            raise InputError("--kills with random weights, which no other process can read; leave one of them out")
    check_out(args.out)
    from storyadapter.bench.soak_run import as_data, markdown, soak, with_kills

    found = soak(args, _STORIES if args.stories is None and args.minutes is None else args.stories)
    kills = (0 if args.synthetic_weights else _KILLS) if args.kills is None else args.kills
    if kills:
        found = with_kills(found, args, kills)
    page = markdown(found)
    print(page)
    write_report(args.out, page, as_data(found))
    return 1 if found.problems else 0


def _sizes(text: str) -> list[int]:
    try:
        return sorted(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of pixels such as 768,1024") from None
