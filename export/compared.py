"""A network to ONNX, compared with eager at small sizes, then pinned to the sizes it is built for."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from torch import nn

from storyadapter.export.as_fp32 import write_as_fp32
from storyadapter.export.onnx_export import export_network
from storyadapter.export.verify import verify_export
from storyadapter.model.contract import NetworkSpec, Range, size_of, split_dim
from storyadapter.model.examples import run_examples
from storyadapter.model.numerics import Precision

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

    Args:
        spec, module, precision: see `export_network`.
        letters: ranges that the file is for; a letter of one value is a constant in it.
        on_stage: called with what is being done.

    Returns:
        The ONNX file, and its relative error.

    Raises:
        EngineBuildError: the file doesn't compute what eager computes.
    """
    module = module.cpu()  # random weights may have been made on a GPU; files are the same from anywhere
    wide = {name: _with_small_latents(value) if name in ("h", "w") else value for name, value in letters.items()}
    on_stage("exporting to ONNX")
    path = export_network(spec, module, wide, precision, folder)
    on_stage("comparing with eager")
    twin = precision == "bf16"
    compared_in: Precision = "fp32" if twin else precision
    examples = run_examples(spec, module.float() if twin else module, wide, compared_in)
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.new_empty(0)  # not deleted: the exporter keeps the parameters themselves for good
    if twin:
        twin_folder = folder / "fp32"
        twin_folder.mkdir()
        error = verify_export(write_as_fp32(path, twin_folder), examples, "bf16")
        shutil.rmtree(twin_folder)
    else:
        error = verify_export(path, examples, compared_in)
    _pin(path, spec, letters)
    return path, error


def _with_small_latents(value: Range) -> Range:
    return Range(min(value.minimum, _COMPARED_LATENTS.minimum), max(value.maximum, _COMPARED_LATENTS.maximum))


def _pin(path: Path, spec: NetworkSpec, letters: Mapping[str, Range]) -> None:
    """Write the sizes that are constants into the file's inputs and outputs."""
    fixed = {name: value.minimum for name, value in letters.items() if value.minimum == value.maximum}
    model = onnx.load(str(path), load_external_data=False)
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            for axis, dim in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
                if isinstance(dim, str) and split_dim(dim)[1] in fixed:
                    axis.dim_value = size_of(dim, fixed)
    # what was inferred of the inner values was inferred for free sizes
    del model.graph.value_info[:]
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)
