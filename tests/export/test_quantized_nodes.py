"""Quantized layers in an ONNX file: the pattern that runtimes know, which computes what the emulation does."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from storyadapter.export.onnx_export import export_compared
from storyadapter.export.quantized_nodes import as_nodes
from storyadapter.export.verify import open_session
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import Precision
from storyadapter.quantization.layers import Fp8Layer
from tests.export.quantized import LETTERS, SPEC, Products


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("fp16", 1e-2), ("bf16", 2e-2)])
def test_a_file_computes_what_the_emulation_does(tmp_path: Path, precision: Precision, most: float) -> None:
    module = Products(TORCH_DTYPES[precision]).eval()
    path, error = export_compared(SPEC, module, LETTERS, precision, tmp_path)
    assert error < most  # here and there another of two neighbours
    model = onnx.load(str(path))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 3 and kinds["DequantizeLinear"] == 6
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    eighths = [tensor for tensor in weights.values() if tensor.data_type == TensorProto.FLOAT8E4M3FN]
    assert sum(len(tensor.dims) > 1 for tensor in eighths) == 3
    assert not any(len(tensor.dims) > 1 for tensor in weights.values() if tensor not in eighths)


def test_what_lies_beyond_the_scale_saturates(tmp_path: Path) -> None:
    module = Products(torch.float32).eval()
    path, _ = export_compared(SPEC, module, LETTERS, "fp32", tmp_path)
    x = torch.randn(2, 16, 8, 8)
    (y,) = open_session(path).run(["y"], {"x": (100 * x).numpy()})
    with torch.no_grad():
        expected = Products(torch.float32).eval()(100 * x)
    assert (torch.from_numpy(y) - expected).norm() / expected.norm() < 1e-2


def test_layers_are_themselves_again_afterwards() -> None:
    module = Products(torch.float32)
    before = dict(module.named_modules())
    with pytest.raises(RuntimeError), as_nodes(module):
        assert not any(isinstance(part, Fp8Layer) for part in module.children())
        raise RuntimeError
    assert dict(module.named_modules()) == before
