"""`storyadapter-trt bench`: the benchmarks by name. Imports nothing heavy."""

from storyadapter.bench import compare, parity, quality, soak
from storyadapter.bench.kernels import command as kernel
from storyadapter.bench.throughput import command as throughput
from storyadapter.cli.main import Commands

# each has HELP, DESCRIPTION, add_arguments and run
BENCHMARKS = {
    "kernel": kernel,
    "quality": quality,
    "parity": parity,
    "throughput": throughput,
    "compare": compare,
    "soak": soak,
}


def add_bench(commands: Commands) -> None:
    """Add the command, with a command for each benchmark."""
    bench = commands.add_parser("bench", help="measure", description="Measure on this machine.")
    benchmarks = bench.add_subparsers(dest="bench", required=True, metavar="BENCHMARK", title="benchmarks")
    for name, module in BENCHMARKS.items():
        parser = benchmarks.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)
