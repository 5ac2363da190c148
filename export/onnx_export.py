"""A network of the contract to an ONNX file, weights beside it, and the check that the file computes the same."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from storyadapter.export import OPSET, onnx_name
from storyadapter.export.grca_node import attach_function, grca_node
from storyadapter.model.contract import NetworkSpec, Range
from storyadapter.model.dynamic_shapes import dynamic_shapes
from storyadapter.model.examples import example_inputs, example_letters
from storyadapter.model.numerics import Precision
from storyadapter.model.unet import GlobalReferenceCrossAttention


def export_network(
    spec: NetworkSpec,
    module: nn.Module,
    ranges: Mapping[str, Range],
    precision: Precision,
    folder: Path,
) -> Path:
    """Write `<network>.onnx` and its weights into `folder`.

    Args:
        spec: the network's inputs and outputs.
        module: takes the inputs in the contract's order; on the CPU, in the precision's dtype.
        ranges: of every dynamic letter; a letter whose range is one value is exported as a constant.

    Returns:
        The file's path.
    """
    letters = example_letters(dict(ranges))
    inputs = example_inputs(spec, letters, precision)
    path = folder / onnx_name(spec.name)
    attentions = [part for part in module.modules() if isinstance(part, GlobalReferenceCrossAttention)]
    eager = [attention.grca for attention in attentions]
    for attention in attentions:
        attention.grca = grca_node
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes(spec, module, ranges),
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                verbose=False,
            )
    finally:
        for attention, own in zip(attentions, eager, strict=True):
            attention.grca = own
    assert program is not None  # as dynamo is on
    program.save(str(path), external_data=True)
    # the exporter's rewriter keeps the last graph for good: it shall not keep the weights with it
    for value in tuple(program.model.graph.initializers.values()):
        value.const_value = None
    model = onnx.load(str(path), load_external_data=False)
    attach_function(model)
    _name_dimensions(model, spec)
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress lines and its notes on operators that no network of ours has are left out."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_dimensions(model: onnx.ModelProto, spec: NetworkSpec) -> None:
    """Give the file's inputs and outputs the contract's letters where they are dynamic."""
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            if value.name != tensor.name:
                raise ValueError(f"{spec.name}: exported {value.name} where the contract has {tensor.name}")
            for axis, dim in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
                if isinstance(dim, str) and not axis.HasField("dim_value"):
                    axis.dim_param = dim
