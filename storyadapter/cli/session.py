"""What `build` and `run` do first: the model's files, the backend, the precision."""

import argparse
from dataclasses import dataclass

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import ModelChoice
from storyadapter.contract import Precision
from storyadapter.engine.backends import AUTO, check_available, choose_backend, choose_precision


@dataclass(frozen=True)
class Session:
    """An opened model and where it is to run."""

    model: ModelChoice
    checkpoint: Checkpoint
    backend: str
    precision: Precision


def open_session(args: argparse.Namespace, model: ModelChoice) -> Session:
    """Check the backend and open the model's files; reads no weights.

    Raises:
        UnavailableError: see `check_available`.
        CheckpointError: see `Checkpoint.open`.
    """
    backend = choose_backend() if args.backend == AUTO else args.backend
    precision: Precision = choose_precision(backend) if args.precision == AUTO else args.precision
    check_available(backend, precision)
    return Session(model, Checkpoint.open(model.paths), backend, precision)
