"""A network to an ONNX file, weights beside it: compared with eager at small sizes, then pinned to its own sizes."""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from storyadapter.export import OPSET, onnx_name
from storyadapter.export.grca_node import attach_function, grca_node
from storyadapter.export.quantized_nodes import as_nodes
from storyadapter.export.verify import TOLERANCE, verify_export, write_as_fp32
from storyadapter.model.contract import Dim, NetworkSpec, Range, size_of, split_dim
from storyadapter.model.dynamic_shapes import dynamic_shapes
from storyadapter.model.examples import example_inputs, example_letters, run_examples
from storyadapter.model.numerics import QUANTIZED_TOLERANCE, Precision
from storyadapter.model.unet import GlobalReferenceCrossAttention
from storyadapter.quantization.layers import QuantizedLayer

# Latents that every file is exported for besides its own: a full-size UNet at full size takes a CPU half an hour.
_COMPARED_LATENTS = Range(8, 16)


def export_compared(
    spec: NetworkSpec,
    module: nn.Module,
    letters: Mapping[str, Range],
    precision: Precision,
    folder: Path,
    on_stage: Callable[[str], None] = lambda what: None,
) -> tuple[Path, float]:
    """Export one network, and compare the file with eager: as it is, or in bf16 as its fp32 twin.

    The module is used up: its weights are gone afterwards, as a full-size UNet and the run of its file don't fit into
    24 GB side by side.

    Arguments as those of `export_network`, `letters` its `ranges`; `on_stage` is called with what is being done. Gives
    the ONNX file, and its relative error.

    Raises:
        EngineBuildError: the file doesn't compute what eager computes.
    """
    module = module.cpu()  # random weights may have been made on a GPU; files are the same from anywhere
    wide = dict(letters)
    for name in wide.keys() & {"h", "w"}:
        low, high = (
            min(wide[name].minimum, _COMPARED_LATENTS.minimum),
            max(wide[name].maximum, _COMPARED_LATENTS.maximum),
        )
        wide[name] = Range(low, high)
    on_stage("exporting to ONNX")
    path = export_network(spec, module, wide, precision, folder)
    on_stage("comparing with eager")
    quantized = any(isinstance(part, QuantizedLayer) for part in module.modules())
    twin, most = precision == "bf16", QUANTIZED_TOLERANCE if quantized else TOLERANCE[precision]
    compared_in: Precision = "fp32" if twin else precision
    examples = run_examples(spec, module.float() if twin else module, wide, compared_in)
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.new_empty(0)  # not deleted: the exporter keeps the parameters themselves for good
    if twin:
        twin_folder = folder / "fp32"
        twin_folder.mkdir()
        error = verify_export(write_as_fp32(path, twin_folder), examples, precision, most)
        shutil.rmtree(twin_folder)
    else:
        error = verify_export(path, examples, compared_in, most)
    _pin(path, spec, letters)
    return path, error


def _pin(path: Path, spec: NetworkSpec, letters: Mapping[str, Range]) -> None:
    """Write the sizes that are constants into the file's inputs and outputs."""
    fixed = {name: value.minimum for name, value in letters.items() if value.minimum == value.maximum}
    model = onnx.load(str(path), load_external_data=False)
    for axis, dim in _dimensions(model, spec):
        if isinstance(dim, str) and split_dim(dim)[1] in fixed:
            axis.dim_value = size_of(dim, fixed)
    # what was inferred of the inner values was inferred for free sizes
    del model.graph.value_info[:]
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)


def export_network(
    spec: NetworkSpec, module: nn.Module, ranges: Mapping[str, Range], precision: Precision, folder: Path
) -> Path:
    """Write `<network>.onnx` and its weights into `folder`; returns the file's path.

    Args:
        module: takes the inputs in the contract's order; on the CPU, in the precision's dtype.
        ranges: of every dynamic letter; a letter whose range is one value is exported as a constant.
    """
    letters = example_letters(dict(ranges))
    inputs = example_inputs(spec, letters, precision)
    path = folder / onnx_name(spec.name)
    attentions = [part for part in module.modules() if isinstance(part, GlobalReferenceCrossAttention)]
    eager = [attention.grca for attention in attentions]
    for attention in attentions:
        attention.grca = grca_node
    try:
        with torch.no_grad(), _quiet(), as_nodes(module):
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
    for axis, dim in _dimensions(model, spec):
        if isinstance(dim, str) and not axis.HasField("dim_value"):
            axis.dim_param = dim
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


def _dimensions(model: onnx.ModelProto, spec: NetworkSpec) -> Iterator[tuple[onnx.TensorShapeProto.Dimension, Dim]]:
    """Each dimension of the file's inputs and outputs, and what the contract has there."""
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            if value.name != tensor.name:
                raise ValueError(f"{spec.name}: exported {value.name} where the contract has {tensor.name}")
            yield from zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True)
