"""Build of the backend `onnxruntime`: every network exported to ONNX and compared with eager."""

import gc
from collections.abc import Callable
from pathlib import Path

from storyadapter.checkpoint import Checkpoint
from storyadapter.contract import Precision, ShapeRanges, network_specs
from storyadapter.export.onnx_export import export_network
from storyadapter.export.probe import probe_module
from storyadapter.export.verify import verify_export
from storyadapter.grca import grca
from storyadapter.modules import iterate_modules


def build_onnx(
    checkpoint: Checkpoint,
    precision: Precision,
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
        ExportError: a file doesn't compute what eager computes.
    """
    geometry = checkpoint.geometry
    letters = ranges.letters(geometry.pixels_per_latent)
    specs = network_specs(geometry)
    errors = {}
    modules = iterate_modules(checkpoint, precision, grca)
    while True:
        on_progress("", "loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            return errors
        spec, vae_in_fp32 = specs[name], geometry.vae_in_fp32
        on_progress(name, "exporting to ONNX")
        probes = probe_module(spec, module, letters, precision, vae_in_fp32)
        path = export_network(spec, module, letters, precision, vae_in_fp32, folder)
        del module  # the UNet and its ONNX session need not fit side by side
        gc.collect()
        on_progress(name, "comparing with eager")
        errors[name] = verify_export(path, probes, "fp32" if name == "vae_decoder" and vae_in_fp32 else precision)
