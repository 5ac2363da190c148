"""What `build` and `run` do first: the model's files, the backend, the numerics."""

import argparse
from dataclasses import dataclass
from typing import cast

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import ModelChoice
from storyadapter.engine.backends import AUTO, check_available, choose_backend, choose_precision
from storyadapter.model.numerics import Numerics, Precision


@dataclass(frozen=True)
class Session:
    """An opened model and where it is to run."""

    model: ModelChoice
    checkpoint: Checkpoint
    backend: str
    numerics: Numerics

    @property
    def how(self) -> str:
        """Backend and numerics, for a message."""
        return f"{self.backend} {self.numerics}"


def choose_engine(backend: str, precision: str) -> tuple[str, Precision]:
    """What was typed; for `auto`, what serves best on this machine."""
    backend = choose_backend() if backend == AUTO else backend
    return backend, choose_precision(backend) if precision == AUTO else cast(Precision, precision)


def open_session(args: argparse.Namespace, model: ModelChoice) -> Session:
    """Check the backend and open the model's files; reads no weights.

    Raises:
        UnavailableError: see `check_available`.
        CheckpointError: see `Checkpoint.open`.
    """
    backend, precision = choose_engine(args.backend, args.precision)
    asked: Precision | None = None if args.vae_precision == AUTO else args.vae_precision
    check_available(backend, Numerics.of(precision, vae_decoder=asked))
    checkpoint = Checkpoint.open(model.paths)
    return Session(model, checkpoint, backend, checkpoint.geometry.numerics(precision, asked))
