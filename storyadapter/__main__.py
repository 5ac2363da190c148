"""The program, `storyadapter-trt` or `python -m storyadapter`: the commands of `cli`, and `bench` beside them."""

import sys
from collections.abc import Sequence

from storyadapter.bench.commands import add_bench
from storyadapter.cli import main as cli


def build_parser() -> cli.Parser:
    """The whole command line; imports nothing heavy."""
    parser, commands = cli.build_parser()
    add_bench(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, see `cli.main.run_program`."""
    return cli.run_program(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
