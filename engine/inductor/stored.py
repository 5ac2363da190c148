"""Compiled code of the engine store with the weights of a checkpoint: compared with eager at their first use."""

from collections.abc import Callable

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.identity import model_weights
from storyadapter.engine.inductor.session import open_inductor
from storyadapter.engine.store import StoredEngine
from storyadapter.engine.uses import ERRORS, note_use
from storyadapter.model.contract import network_specs
from storyadapter.model.networks import Networks


def was_compared(engine: StoredEngine, checkpoint: Checkpoint) -> bool:
    """Whether this code was found to compute what eager computes with a checkpoint's weights."""
    use = engine.uses.get(model_weights(checkpoint).key)
    errors = use.details.get(ERRORS) if use else None
    return isinstance(errors, dict) and errors.keys() == network_specs(checkpoint.geometry).keys()


def open_stored(
    engine: StoredEngine, checkpoint: Checkpoint, device: torch.device, on_stage: Callable[[str, str], None]
) -> Networks:
    """The networks of a checkpoint on an engine's code.

    Raises:
        EngineBuildError: a network computes something else than eager with these weights; nothing is noted.
    """
    compared = was_compared(engine, checkpoint)
    letters = engine.ranges.letters(checkpoint.geometry.pixels_per_latent)
    networks, errors = open_inductor(
        engine.folder,
        checkpoint,
        engine.identity.numerics,
        letters,
        device,
        engine.details["weight_bytes"],
        on_stage,
        compared=compared,
    )
    if not compared:
        note_use(engine.folder, model_weights(checkpoint).key, checkpoint.label, {ERRORS: errors})
    return networks
