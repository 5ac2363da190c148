"""What `build` and `run` do first: the model's files, the backend, the precisions."""

import argparse
from dataclasses import dataclass

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import ModelChoice
from storyadapter.engine.backends import AUTO, check_available, choose_backend, choose_precision
from storyadapter.model.contract import Precision


@dataclass(frozen=True)
class Session:
    """An opened model and where it is to run."""

    model: ModelChoice
    checkpoint: Checkpoint
    backend: str
    precision: Precision
    vae_precision: Precision

    @property
    def how(self) -> str:
        """Backend and precisions, for a message."""
        vae = "" if self.vae_precision == self.precision else f" (VAE {self.vae_precision})"
        return f"{self.backend} {self.precision}{vae}"


def open_session(args: argparse.Namespace, model: ModelChoice) -> Session:
    """Check the backend and open the model's files; reads no weights.

    Raises:
        UnavailableError: see `check_available`.
        CheckpointError: see `Checkpoint.open`.
    """
    backend = choose_backend() if args.backend == AUTO else args.backend
    precision: Precision = choose_precision(backend) if args.precision == AUTO else args.precision
    asked: Precision | None = None if args.vae_precision == AUTO else args.vae_precision
    check_available(backend, precision, asked)
    checkpoint = Checkpoint.open(model.paths)
    vae_precision = asked or checkpoint.geometry.default_vae_precision(precision)
    return Session(model, checkpoint, backend, precision, vae_precision)
