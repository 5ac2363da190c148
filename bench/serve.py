"""`storyadapter-trt bench serve`: many clients of a server that is killed now and then."""

import argparse
from functools import partial

from storyadapter.bench.options import add_count, add_engine_options, add_report_options, check_least, number
from storyadapter.bench.report import check_out, give_report

HELP = "many clients of a server, cancels and kills: latency, throughput, and that no story is lost"
DESCRIPTION = """\
Starts a server with the demo model and sends stories to it: from many clients, at a rate or as fast as they can; some
are cancelled, some readers of events are slow or vanish, and the server and its workers are killed now and then. Every
accepted story must end once, with the pictures that run draws. Exit code 1 if one doesn't.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; imports nothing heavy."""
    load = parser.add_argument_group("load")
    add_count(load, "--stories", 200, "that are sent", "N")
    add_count(load, "--clients", 50, "at the same time", "N")
    load.add_argument(
        "--rate",
        type=partial(number, wanted="a rate above 0", is_valid=lambda rate: rate > 0),
        metavar="R",
        help="stories that arrive in a second, at random (default: each client sends its next when one has ended)",
    )
    add_count(load, "--frames", 3, "of a story, at most", "N")
    add_count(load, "--iterations", 1, "after the text-only one", "K")
    add_count(load, "--steps", 2, "denoising steps")
    add_count(load, "--kills", 5, "of the server, by SIGKILL", "N")
    add_count(load, "--worker-kills", 0, "of workers, with --workers", "N")
    add_count(load, "--seed", 0, "of everything random")
    parser.add_argument("--workers", type=int, metavar="N", help="of the server, see serve (default: in its process)")
    add_engine_options(parser, backend="what runs the networks", default="eager")
    add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    """Put the server under load, print the page, write the files.

    Returns:
        0, or 1 if a story was lost or drawn otherwise.

    Raises:
        InputError: options that don't fit together.
        RunError: the server doesn't start, or a file can't be written.
    """
    check_least(args, stories=1, clients=1, frames=1, iterations=0, steps=1, kills=0, worker_kills=0)
    check_out(args.out)
    from storyadapter.bench.serve_run import as_data, markdown, measure

    found = measure(args)
    give_report(args.out, markdown(found), as_data(found))
    return 1 if found.problems else 0
