"""The check of every export: ONNX Runtime on the CPU gives what eager gave, or nothing is stored.

ONNX Runtime's CPU provider can't multiply matrices in bf16, so a bf16 file is run as its fp32 twin: the exported file
itself - the same nodes, the same weights to the last bit - with every bf16 written as fp32, which holds each of them
exactly. It tells whether the file computes what eager computes; what rounding to bf16 does to the result, it can't.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from storyadapter.model.examples import Example, compare_with_eager
from storyadapter.model.numerics import Precision

# ‖ONNX Runtime − eager‖ / ‖eager‖; two orders of summation in half precision differ by a few 1e-3. A bf16 file is run
# as its fp32 twin, and what differs then is the constants that the exporter folded in bf16.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-3}
_ALIGNMENT = 4096  # so that a runtime may map a tensor into memory


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU that tells errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # it would make operators for integers of what is quantized to e4m3, which they don't take
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def verify_export(path: Path, examples: Sequence[Example], precision: Precision, tolerance: float) -> float:
    """Run an exported network on its examples; see `compare_with_eager`."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return compare_with_eager(path.name, run, examples, precision, tolerance)


def write_as_fp32(source: Path, folder: Path) -> Path:
    """Write the fp32 twin of a bf16 network, weights beside it; one tensor at a time is in memory.

    Args:
        source: an exported `.onnx` file.
        folder: another folder than the source's.

    Returns:
        The twin's path.
    """
    model = onnx.load(str(source), load_external_data=False)
    path = folder / source.name
    with open(folder / f"{source.name}.data", "wb") as weights:
        for tensor in _tensors(model):
            _as_fp32(tensor, source.parent, weights)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in _nodes(model):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return path


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    def walk(graph: GraphProto) -> Iterator[NodeProto]:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield from walk(attribute.g)

    yield from walk(model.graph)
    for function in model.functions:
        yield from function.node


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from attribute.g.initializer


def _as_fp32(tensor: TensorProto, folder: Path, weights: BinaryIO) -> None:
    """Copy a tensor's external data into `weights`; bf16 becomes fp32, inside or outside of the file."""
    external = uses_external_data(tensor)
    if external:
        place = {entry.key: entry.value for entry in tensor.external_data}
        with open(folder / place["location"], "rb") as file:
            file.seek(int(place.get("offset", 0)))
            data = file.read(int(place["length"]))
    elif tensor.data_type == TensorProto.BFLOAT16:
        data = onnx.numpy_helper.to_array(tensor).tobytes()
    else:
        return
    if tensor.data_type == TensorProto.BFLOAT16:
        data = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
        tensor.data_type = TensorProto.FLOAT
    for field in ("raw_data", "int32_data", "external_data"):
        tensor.ClearField(field)
    if not external:
        tensor.raw_data = data
        return
    weights.write(b"\0" * (-weights.tell() % _ALIGNMENT))
    start = weights.tell()
    weights.write(data)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", weights.name.rpartition("/")[2]), ("offset", start), ("length", len(data))):
        tensor.external_data.add(key=key, value=str(value))
