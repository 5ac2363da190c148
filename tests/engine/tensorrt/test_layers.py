"""The builder's layer list, as TensorRT-RTX 1.7 writes it."""

import pytest

from storyadapter.engine.tensorrt.worker import Layer, parse_layers
from tests.engine.tensorrt.building import BoundTensor, bound_tensors

TEXT = """\
Name: __mye3510_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: node_a+node_b_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,32], Strides: [32,1], StrideOrder: [1,0], \
Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [], TacticName: t, StreamId: 0, \
Metadata: [ONNX Layer: node_a][ONNX Layer: node_b]
Name: _gemm_mha_v2_myl0_40, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: _gemm_mha_v2_0x16, \
StreamId: 0, Metadata: [ONNX Layer: G/Attention_14 | node__symbolic (G)]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,32], Location: Device, IsShapeInferenceIO: false, \
ProfileInfo: [ { MinShape: [1,32], OptShape: [4,32], MaxShape: [7,32], Format: f }, { MinShape: [2,32], \
OptShape: [2,32], MaxShape: [2,32], Format: f }]
 Name: y, IOMode: Output, DataType: Half, Dimensions: [3,-1], Location: Device, IsShapeInferenceIO: false, \
ProfileInfo: [ { Format: f }]

Engine Metadata:
 Multi-Device: Disabled
"""  # noqa: E501, W291


def test_layers_and_tensors_are_read() -> None:
    layers = parse_layers(TEXT)
    assert layers == (
        Layer("__mye3510_0_myl0_0", "shape_call", ()),
        Layer("node_a+node_b_myl0_1", "gemm", ("node_a", "node_b"), ("Half",)),
        Layer("_gemm_mha_v2_myl0_40", "kgen", ("G/Attention_14 | node__symbolic (G)",)),
    )
    assert bound_tensors(TEXT) == (
        BoundTensor("x", True, "Half", (-1, 32), (((1, 32), (4, 32), (7, 32)), ((2, 32), (2, 32), (2, 32)))),
        BoundTensor("y", False, "Half", (3, -1), ()),
    )
    assert sum(layer.is_fused_attention for layer in layers) == 1


@pytest.mark.parametrize("text", ["", "I/O Tensors:\n", "nothing of the kind"])
def test_a_message_without_layers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no layers"):
        parse_layers(text)


def test_a_layer_in_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="not a layer as TensorRT's builder writes them: Name: x, Kind: y"):
        parse_layers(TEXT + "Name: x, Kind: y\n")
