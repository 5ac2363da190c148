"""Quantized layers in an ONNX file: the pattern that runtimes know, which computes what the emulation does."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from storyadapter.bench.synthetic import TOY, SyntheticCheckpoint
from storyadapter.export.onnx_export import export_compared
from storyadapter.export.quantized_nodes import as_nodes
from storyadapter.export.verify import open_session
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.examples import example_inputs, example_letters
from storyadapter.model.grca import grca
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import NUMBER_FORMATS, QUANTIZED_TOLERANCE, NumberFormat, Precision
from storyadapter.model.unet import split_unet
from storyadapter.quantization.calibration import calibrate
from storyadapter.quantization.layers import QuantizedLayer
from storyadapter.quantization.recipe import INT8
from storyadapter.quantization.scales import Scales
from tests.export.quantized import LETTERS, SPEC, Products

SIDE = Range(64, 64)
FORMATS = pytest.mark.parametrize(("form", "stored"), [("fp8", TensorProto.FLOAT8E4M3FN), ("int8", TensorProto.INT8)])


@FORMATS
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("fp16", 1e-2), ("bf16", 2e-2)])
def test_a_file_computes_what_the_emulation_does(
    tmp_path: Path, precision: Precision, most: float, form: NumberFormat, stored: int
) -> None:
    module = Products(TORCH_DTYPES[precision], form).eval()
    path, error = export_compared(SPEC, module, LETTERS, precision, tmp_path)
    assert error < most  # here and there another of two neighbours
    model = onnx.load(str(path))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 3 and kinds["DequantizeLinear"] == 6
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    eighths = [tensor for tensor in weights.values() if tensor.data_type == stored]
    assert sum(len(tensor.dims) > 1 for tensor in eighths) == 3
    assert not any(len(tensor.dims) > 1 for tensor in weights.values() if tensor not in eighths)


@pytest.mark.parametrize("form", NUMBER_FORMATS)
def test_what_lies_beyond_the_scale_saturates(tmp_path: Path, form: NumberFormat) -> None:
    module = Products(torch.float32, form).eval()
    path, _ = export_compared(SPEC, module, LETTERS, "fp32", tmp_path)
    x = torch.randn(2, 16, 8, 8)
    (y,) = open_session(path).run(["y"], {"x": (100 * x).numpy()})
    with torch.no_grad():
        expected = Products(torch.float32, form).eval()(100 * x)
    assert (torch.from_numpy(y) - expected).norm() / expected.norm() < 1e-2


def test_layers_are_themselves_again_afterwards() -> None:
    module = Products(torch.float32, "int8")
    before = dict(module.named_modules())
    with pytest.raises(RuntimeError), as_nodes(module):
        assert not any(isinstance(part, QuantizedLayer) for part in module.children())
        raise RuntimeError
    assert dict(module.named_modules()) == before


# SDXL's UNet with one level of attention instead of two: every kind of layer is still there, and half as many
TWO_LEVELS = {
    **TOY.unet,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}


def test_a_whole_denoiser_in_int8_computes_what_the_emulation_does(tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    checkpoint = SyntheticCheckpoint(replace(TOY, unet=TWO_LEVELS), torch.device("cpu"))
    spec, letters = network_specs(checkpoint.geometry)["denoiser"], ShapeRanges(4, 6, SIDE, SIDE).letters()
    parts = checkpoint.load("unet", torch.float32), checkpoint.load_ip_adapter(torch.float32)
    denoiser, measured = (split_unet(*deepcopy(parts), grca)["denoiser"].eval() for _ in range(2))
    inputs = example_inputs(spec, example_letters(letters), "fp32").values()
    with torch.no_grad():
        scales = Scales(INT8, "model", *calibrate(measured, INT8, lambda: measured(*inputs)))
    scales.apply(denoiser)
    path, error = export_compared(spec, denoiser, letters, "fp32", tmp_path)
    assert 0 < error < QUANTIZED_TOLERANCE
    kinds = Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
    assert kinds["QuantizeLinear"] == len(scales.inputs) > len(scales.smoothing) > 20
