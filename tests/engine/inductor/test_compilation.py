"""One network, compiled and stored."""

from pathlib import Path

import torch
from torch import nn

from storyadapter import Checkpoint
from storyadapter.engine.inductor.compilation import build_network
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.examples import run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics

CPU = torch.device("cpu")
NAME = "reference_projection"


def transposed(checkpoint: Checkpoint) -> nn.Module:
    ((_, module),) = iterate_modules(checkpoint, Numerics("fp32"), grca, (NAME,))
    for weight in module.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.T.contiguous().T
    assert any(not weight.is_contiguous() for weight in module.parameters())
    return module


def test_weights_that_lie_transposed_are_bound_as_they_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As of a checkpoint saved by pickle, which keeps strides."""
    size = Range(64, 64)
    letters = ShapeRanges(2, 8, size, size).letters()
    spec = network_specs(checkpoint.geometry)[NAME]
    module = transposed(checkpoint)
    examples = run_examples(spec, module, letters, "fp32")
    built = build_network(spec, module, Numerics("fp32"), letters, tmp_path)
    assert built.relative_error < 1e-5
    weights = prepare(transposed(checkpoint), CPU)
    assert built.weight_bytes == sum(weight.nbytes for weight in weights.values())
    network = InductorNetwork(spec, tmp_path, "fp32", CPU, letters, weights)
    for example in examples:
        drawn = network(example.inputs)
        for name, expected in example.outputs.items():
            torch.testing.assert_close(drawn[name], expected)
