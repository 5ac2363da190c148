"""What `build` and `run` do first: the model's files, the backend, the numerics."""

import argparse
from dataclasses import dataclass
from typing import cast

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import ModelChoice
from storyadapter.engine.backend import Backend
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.model.numerics import Numerics, Precision


@dataclass(frozen=True)
class Session:
    """An opened model and where it is to run."""

    model: ModelChoice
    checkpoint: Checkpoint
    backend: Backend
    numerics: Numerics

    @property
    def how(self) -> str:
        """Backend and numerics, for a message."""
        return f"{self.backend.name} {self.numerics}"


def choose_engine(backend: str, precision: str) -> tuple[Backend, Precision]:
    """What was typed; for `auto`, what serves best on this machine."""
    found = find_backend(backend)
    return found, found.default_precision() if precision == AUTO else cast(Precision, precision)


def open_session(args: argparse.Namespace, model: ModelChoice) -> Session:
    """Check the backend and open the model's files; reads no weights.

    Raises:
        UnavailableError: see `Backend.check`.
        CheckpointError: see `Checkpoint.open`.
    """
    backend, precision = choose_engine(args.backend, args.precision)
    asked: Precision | None = None if args.vae_precision == AUTO else args.vae_precision
    backend.check(Numerics.of(precision, vae_decoder=asked))
    checkpoint = Checkpoint.open(model.paths)
    return Session(model, checkpoint, backend, checkpoint.geometry.numerics(precision, asked))
