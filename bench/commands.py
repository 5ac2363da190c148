"""`storyadapter-trt bench`: the benchmarks by name. Imports nothing heavy.

Each is a module with HELP, DESCRIPTION, `add_arguments`, and `run`, which measures what was typed, prints a page and
writes the files that were asked for. It returns the exit code: 0, or 1 where something isn't as the module demands. It
raises InputError for options that don't fit together, UnavailableError for what can't be had here, EngineBuildError,
and RunError for a frame with values that aren't finite or a file that can't be written.
"""

from storyadapter.bench import compare, frontier, parity, quality, serve, soak, workers
from storyadapter.bench.kernels import command as kernel
from storyadapter.bench.throughput import command as throughput
from storyadapter.cli.main import Commands

BENCHMARKS = {"kernel": kernel, "quality": quality, "parity": parity, "throughput": throughput}
BENCHMARKS |= {"frontier": frontier, "compare": compare, "soak": soak, "workers": workers, "serve": serve}


def add_bench(commands: Commands) -> None:
    """Add the command, with a command for each benchmark."""
    bench = commands.add_parser("bench", help="measure", description="Measure on this machine.")
    benchmarks = bench.add_subparsers(dest="bench", required=True, metavar="BENCHMARK", title="benchmarks")
    for name, module in BENCHMARKS.items():
        parser = benchmarks.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)
