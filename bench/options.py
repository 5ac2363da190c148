"""Options that several benchmarks have. Imports nothing heavy."""

import argparse
from pathlib import Path

from storyadapter.cli.options import given_checkpoint_options
from storyadapter.engine.backends import AUTO, BACKENDS
from storyadapter.method.errors import InputError
from storyadapter.model.numerics import PRECISIONS


def add_backend_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Backend, precision and engine store; `purpose` says in the help what the backend is for."""
    parser.add_argument("--backend", default=AUTO, choices=(AUTO, *BACKENDS), help=f"{purpose} (default: auto, as run)")
    parser.add_argument(
        "--precision", default=AUTO, choices=(AUTO, *PRECISIONS), help="(default: auto, fp16 on a GPU, fp32 on a CPU)"
    )
    add_engine_dir_option(parser)


def add_engine_dir_option(parser: argparse.ArgumentParser) -> None:
    """Where engines are looked for and built."""
    parser.add_argument("--engine-dir", type=Path, metavar="D", help="engine store (default: in the user's cache)")


def add_report_options(parser: argparse.ArgumentParser, files: str = "FILE.md and FILE.json") -> None:
    """Where a report is written, and the commit that it names; `files` are told in the help."""
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write {files}")
    parser.add_argument("--commit", metavar="SHA", help="commit to report, where the checkout has no history")


def refuse_checkpoint_options(args: argparse.Namespace, *instead: str) -> None:
    """Raises InputError if files of a model were typed where its weights are random; `instead`: options for those."""
    for option in given_checkpoint_options(args):
        raise InputError(f"{option} with random weights; expected one of {', '.join((option, *instead))}")
