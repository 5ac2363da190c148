"""The check of every export: ONNX Runtime on the CPU gives what eager gave, or nothing is stored."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from storyadapter.export.examples import Example
from storyadapter.export.ort_session import open_session
from storyadapter.method.errors import StoryAdapterError
from storyadapter.model.numerics import Precision

# ‖ONNX Runtime − eager‖ / ‖eager‖; two orders of summation in half precision differ by a few 1e-3. A bf16 file is run
# as its fp32 twin (`as_fp32`), and what differs then is the constants that the exporter folded in bf16.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-3}


class ExportError(StoryAdapterError):
    """An exported network doesn't compute what eager computes."""


def verify_export(path: Path, examples: Sequence[Example], precision: Precision) -> float:
    """Run an exported network on its examples.

    Returns:
        The largest relative error of any output.

    Raises:
        ExportError: it is above the precision's tolerance, or not finite.
    """
    session = open_session(path)
    worst = 0.0
    for example in examples:
        feed = {name: tensor.numpy() for name, tensor in example.inputs.items()}
        names = list(example.outputs)
        for name, got in zip(names, session.run(names, feed), strict=True):
            where = f"{path.name}: output {name}"
            worst = max(
                worst,
                relative_error(where, torch.from_numpy(got), example.outputs[name], precision, TOLERANCE[precision]),
            )
    return worst


def relative_error(where: str, got: Tensor, expected: Tensor, precision: Precision, tolerance: float) -> float:
    """‖got − expected‖ / ‖expected‖ of one output.

    Args:
        where: names the output in a message.
        got, expected: the output, and what eager gives; any dtype and device.
        precision: for the message.
        tolerance: the largest error allowed.

    Raises:
        ExportError: the shapes differ, or the error is above `tolerance` or not finite.
    """
    if got.shape != expected.shape:
        raise ExportError(f"{where} has shape {tuple(got.shape)}; eager gives {tuple(expected.shape)}")
    reference = expected.double().cpu()
    error = float((got.double().cpu() - reference).norm() / reference.norm())
    if not error <= tolerance:
        raise ExportError(
            f"{where} differs from eager by {error:.2e} (relative) in {precision}; expected at most {tolerance:g}"
        )
    return error
