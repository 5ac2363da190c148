"""`storyadapter-trt bench soak`: many stories in one process, and a run that is killed and resumed."""

import argparse
from dataclasses import asdict

from storyadapter.bench import options
from storyadapter.bench.report import check_out, give_report
from storyadapter.cli.options import add_checkpoint_options
from storyadapter.cli.values import each
from storyadapter.method.errors import InputError
from storyadapter.model.contract import check_pixels

HELP = "many stories in one process, and a run that is killed: memory must not grow, pictures must not change"
DESCRIPTION = """\
Draws many stories of random length, size and seed in one process. Every third is the first one again: its pictures must
be the same each time, and the memory in use after it must not grow. Then a run is killed at random moments, and resumed
each time: its pictures must be those of a run without a stop, and no more frames may be drawn again than were under
way; with --worker-kills, the same of a run whose workers are killed. Exit code 1 if one of these fails.
"""

MODELS = ("sdxl", "toy")
_STORIES = 24
_KILLS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--workers", type=int, metavar="N", help="that draw the run that is killed, see run")
    options.add_count(parser, "--worker-kills", 0, "of these workers, in a run of its own", "N")
    options.add_count(parser, "--seed", 0, "of the choice of stories and moments")
    options.add_count(parser, "--steps", 2, "denoising steps of each")
    options.add_count(parser, "--max-references", 6, "frames of a story at the most", "N")
    options.add_count(parser, "--max-frames", 3, "frames of a micro-batch at the most", "F")
    parser.add_argument(
        "--sizes",
        type=lambda text: sorted(each(text, int, "is not a list of pixels such as 768,1024")),
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
    options.add_engine_options(
        parser, backend="what runs the networks; its engine is built first where the store has none"
    )
    options.add_report_options(parser)
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if memory grew, or a story that was repeated or killed gave other pictures."""
    options.check_least(args, stories=9, steps=1, max_references=1, max_frames=1, kills=0, workers=1, worker_kills=0)
    for pixels in args.sizes or ():
        check_pixels("sizes", pixels)
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes is {args.minutes:g}; expected more than 0")
    if args.worker_kills and not args.workers:
        raise InputError("--worker-kills without --workers; expected both")
    if args.synthetic_weights:
        options.refuse_checkpoint_options(args, "--synthetic-weights")
        if args.kills or args.worker_kills:
            option = "--kills" if args.kills else "--worker-kills"
            raise InputError(f"{option} with random weights, which no other process can read; leave one of them out")
    check_out(args.out)
    from storyadapter.bench.soak_run import markdown, soak, with_kills

    found = soak(args, _STORIES if args.stories is None and args.minutes is None else args.stories)
    kills = (0 if args.synthetic_weights else _KILLS) if args.kills is None else args.kills
    if kills or args.worker_kills:
        found = with_kills(found, args, kills)
    data = {"kind": "soak", "version": 2, "passed": not found.problems, **asdict(found)}
    give_report(args.out, markdown(found), data)
    return 1 if found.problems else 0
