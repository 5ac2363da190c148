"""An opened model and where it is to run, from what was typed. Imports nothing heavy."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import ModelChoice
from storyadapter.engine.backend import Backend
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.model.numerics import (
    NUMBER_FORMATS,
    PRECISIONS,
    Numerics,
    Precision,
    Quantization,
    vae_arithmetic,
)

if TYPE_CHECKING:
    from storyadapter.quantization.scales import Scales


@dataclass(frozen=True)
class Session:
    """An opened model and where it is to run."""

    model: ModelChoice
    checkpoint: Checkpoint
    backend: Backend
    numerics: Numerics

    def quantized(self, scales: "Mapping[str, Scales]") -> "Session":
        """The same with networks quantized by their model's scales."""
        from storyadapter.engine.calibration import quantized

        checkpoint, numerics = quantized(self.checkpoint, self.numerics, scales)
        return replace(self, checkpoint=checkpoint, numerics=numerics)

    @property
    def how(self) -> str:
        """Backend and numerics, for a message."""
        return f"{self.backend.name} {self.numerics}"


def calibrated_by(scales: "Mapping[str, Scales]") -> str:
    """By which stories scales were found, in words: one line for `build`, `run` and `serve`."""
    by = {name: f'"{own.story.title}"' if own.story else "the built-in stories" for name, own in scales.items()}
    if len(set(by.values())) == 1:
        return f"8-bit products calibrated by {next(iter(by.values()))}"
    return f"8-bit products calibrated: {', '.join(f'{name} by {what}' for name, what in by.items())}"


def choose_engine(backend: str, precision: str, vae_precision: str = AUTO) -> tuple[Backend, Precision]:
    """What was typed; for `auto`, and beside quantized products, what serves best on this machine."""
    found = find_backend(backend, precision=precision, vae_precision=vae_precision)
    typed_ = precision in PRECISIONS
    return found, cast(Precision, precision) if typed_ else found.default_precision()


def open_session(args: argparse.Namespace, model: ModelChoice) -> Session:
    """Check the backend and open the model's files; reads no weights.

    Raises:
        UnavailableError: see `Backend.check`.
        CheckpointError: see `Checkpoint.open`.
    """
    backend, precision = choose_engine(args.backend, args.precision, args.vae_precision)
    asked = vae_arithmetic(args.vae_precision)
    quantization = Quantization(args.precision) if args.precision in NUMBER_FORMATS else None
    backend.check(Numerics.of(precision, quantization, vae_decoder=asked))
    checkpoint = Checkpoint.open(model.paths)
    return Session(model, checkpoint, backend, checkpoint.geometry.numerics(precision, asked, quantization))
