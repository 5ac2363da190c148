"""The check of every export: ONNX Runtime on the CPU gives what eager gave, or nothing is stored."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storyadapter.contract import Precision
from storyadapter.errors import StoryAdapterError
from storyadapter.export.ort_session import open_session
from storyadapter.export.probe import Probe

# ‖ONNX Runtime − eager‖ / ‖eager‖; two orders of summation in half precision differ by a few 1e-3. A bf16 file is run
# as its fp32 twin (`widen`), and what differs then is the constants that the exporter folded in bf16.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-3}


class ExportError(StoryAdapterError):
    """An exported network doesn't compute what eager computes."""


def verify_export(path: Path, probes: Sequence[Probe], precision: Precision) -> float:
    """Run an exported network on its probes.

    Returns:
        The largest relative error of any output.

    Raises:
        ExportError: it is above the precision's tolerance, or not finite.
    """
    session = open_session(path)
    worst = 0.0
    for probe in probes:
        feed = {name: tensor.numpy() for name, tensor in probe.inputs.items()}
        names = list(probe.outputs)
        for name, got in zip(names, session.run(names, feed), strict=True):
            expected = probe.outputs[name].double().numpy()
            if got.shape != expected.shape:
                raise ExportError(f"{path.name}: output {name} has shape {got.shape}; eager gives {expected.shape}")
            error = float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))
            if not error <= TOLERANCE[precision]:
                raise ExportError(
                    f"{path.name}: output {name} differs from eager by {error:.2e} (relative) in {precision}; "
                    f"expected at most {TOLERANCE[precision]:g}"
                )
            worst = max(worst, error)
    return worst
