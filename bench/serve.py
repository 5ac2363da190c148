"""`storyadapter-trt bench serve`: many clients of a server that is killed now and then."""

import argparse
from functools import partial

from storyadapter.bench.options import add_engine_options, add_report_options, check_least, number
from storyadapter.bench.report import check_out, write_report

HELP = "many clients of a server, cancels and kills: latency, throughput, and that no story is lost"
DESCRIPTION = """\
Starts a server with the demo model and sends stories to it: from many clients, at a rate or as fast as they can; some
are cancelled, some readers of events are slow or vanish, and the server and its workers are killed now and then. Every
accepted story must end once, with the pictures that run draws. Exit code 1 if one doesn't.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; imports nothing heavy."""
    load = parser.add_argument_group("load")
    load.add_argument("--stories", type=int, default=200, metavar="N", help="that are sent (default: %(default)s)")
    load.add_argument("--clients", type=int, default=50, metavar="N", help="at the same time (default: %(default)s)")
    load.add_argument(
        "--rate",
        type=partial(number, wanted="a rate above 0", is_valid=lambda rate: rate > 0),
        metavar="R",
        help="stories that arrive in a second, at random (default: each client sends its next when one has ended)",
    )
    load.add_argument("--frames", type=int, default=3, metavar="N", help="of a story, at most (default: %(default)s)")
    load.add_argument(
        "--iterations", type=int, default=1, metavar="K", help="after the text-only one (default: %(default)s)"
    )
    load.add_argument("--steps", type=int, default=2, help="denoising steps (default: %(default)s)")
    load.add_argument(
        "--kills", type=int, default=5, metavar="N", help="of the server, by SIGKILL (default: %(default)s)"
    )
    load.add_argument(
        "--worker-kills", type=int, default=0, metavar="N", help="of workers, with --workers (default: %(default)s)"
    )
    load.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
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
    page = markdown(found)
    print(page)
    write_report(args.out, page, as_data(found))
    return 1 if found.problems else 0
