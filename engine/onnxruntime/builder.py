"""Build of the backend `onnxruntime`: every network exported to ONNX and compared with eager."""

import functools
from collections.abc import Callable
from pathlib import Path

from storyadapter.checkpoint import Checkpoint
from storyadapter.export.onnx_export import export_compared
from storyadapter.model.contract import ShapeRanges, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics


def build_onnx(
    checkpoint: Checkpoint,
    numerics: Numerics,
    ranges: ShapeRanges,
    folder: Path,
    on_progress: Callable[[str, str], None],
) -> dict[str, float]:
    """Export the seven networks into `folder`, one after the other, each compared with eager.

    Args:
        on_progress: called with a network's name and what is being done to it.

    Returns:
        Relative error against eager by network.

    Raises:
        EngineBuildError: a file doesn't compute what eager computes.
    """
    geometry = checkpoint.geometry
    letters = ranges.letters(geometry.pixels_per_latent)
    specs = network_specs(geometry)
    errors: dict[str, float] = {}
    modules = iterate_modules(checkpoint, numerics, grca)
    while True:
        on_progress("", "loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            return errors
        _, errors[name] = export_compared(
            specs[name],
            module,
            letters,
            numerics[name],
            folder,
            functools.partial(on_progress, name),
        )
