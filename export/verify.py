"""The check of every export: ONNX Runtime on the CPU gives what eager gave, or nothing is stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from storyadapter.model.examples import Example, compare_with_eager
from storyadapter.model.numerics import Precision


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU that tells errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ‖ONNX Runtime − eager‖ / ‖eager‖; two orders of summation in half precision differ by a few 1e-3. A bf16 file is run
# as its fp32 twin (`as_fp32`), and what differs then is the constants that the exporter folded in bf16.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-3}


def verify_export(path: Path, examples: Sequence[Example], precision: Precision) -> float:
    """Run an exported network on its examples; see `compare_with_eager`."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return compare_with_eager(path.name, run, examples, precision, TOLERANCE[precision])
