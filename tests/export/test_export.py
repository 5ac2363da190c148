"""Exported files compute what eager computes; fp16 and bf16 are compared by the tests of the engines that are built."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.export import OPSET
from storyadapter.export.onnx_export import export_compared
from storyadapter.export.verify import open_session, verify_export, write_as_fp32
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges, TensorSpec, network_specs, size_of, split_dim
from storyadapter.model.examples import Example

LETTERS = ShapeRanges(4, 6, Range(64, 96), Range(64, 64)).letters()
LINEAR = NetworkSpec("linear", (TensorSpec("x", ("B", 8)),), (TensorSpec("y", ("B", 8)),))


def test_every_network_computes_what_eager_computes(free_engine: StoredEngine) -> None:
    errors = free_engine.details["relative_error_against_eager"]
    assert len(errors) == 10
    assert all(0 < error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("fixed", [{"w": 8}, {"h": 8, "w": 8, "M": 1}], ids=["one width", "one size and one chunk"])
def test_files_carry_the_contracts_letters_and_the_stated_opset(
    fixed: dict[str, int],
    free_engine: StoredEngine,
    controlled_checkpoint: Checkpoint,
    tiny_engine_dir: Path,
    checkpoint: Checkpoint,
) -> None:
    """Letters that an engine has for one value are numbers in its files."""
    engine, geometry = free_engine, controlled_checkpoint.geometry
    if "M" in fixed:
        ((engine,), _), geometry = EngineStore(tiny_engine_dir).scan(), checkpoint.geometry
    for name, spec in network_specs(geometry).items():
        model = onnx.load(str(engine.folder / f"{name}.onnx"), load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
        for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            for value, tensor in zip(values, tensors, strict=True):
                dims = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
                known = [isinstance(dim, str) and split_dim(dim)[1] in fixed for dim in tensor.shape]
                wanted = [size_of(dim, fixed) if one else dim for dim, one in zip(tensor.shape, known, strict=True)]
                assert (value.name, dims) == (tensor.name, wanted)


def test_the_operator_is_one_node_with_its_meaning_in_the_file(free_engine: StoredEngine) -> None:
    model = onnx.load(str(free_engine.folder / "denoiser.onnx"), load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == "storyadapter"]
    assert len(nodes) == 7
    for node in nodes:
        assert node.op_type == "GlobalReferenceCrossAttention"
        assert [(a.name, a.s) for a in node.attribute] == [("plugin_namespace", b"storyadapter")]
    assert [(f.domain, f.name) for f in model.functions] == [("storyadapter", "GlobalReferenceCrossAttention")]
    assert all(node.name for node in model.functions[0].node)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    module = Linear()
    path, _ = export_compared(LINEAR, module, LETTERS, "fp32", tmp_path)
    assert not any(weight.numel() for weight in module.parameters())
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    right = Linear()(x).detach()
    assert verify_export(path, [Example({"x": x}, {"y": right})], "fp32", 1e-4) < 1e-6
    for wrong in (1.01 * right, right.roll(1, 0), torch.full_like(right, torch.nan)):
        with pytest.raises(
            EngineBuildError, match="^linear.onnx: output y differs from eager by .* in fp32; expected at"
        ):
            verify_export(path, [Example({"x": x}, {"y": wrong})], "fp32", 1e-4)
    with pytest.raises(EngineBuildError, match=r"^linear.onnx: output y has shape \(2, 8\); eager gives \(1, 8\)$"):
        verify_export(path, [Example({"x": x}, {"y": right[:1]})], "fp32", 1e-4)


def test_the_fp32_twin_of_a_bf16_file_has_its_weights_to_the_last_bit(tmp_path: Path) -> None:
    module = Linear().bfloat16()
    weights = {name: weight.detach().float().clone() for name, weight in module.named_parameters()}
    path, error = export_compared(LINEAR, module, LETTERS, "bf16", tmp_path)
    assert error < 1e-6
    assert not (tmp_path / "fp32").exists()
    model = onnx.load(str(path))
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    (tmp_path / "twin").mkdir()
    twin = write_as_fp32(path, tmp_path / "twin")
    as_fp32 = onnx.load(str(twin))
    assert not any(tensor.data_type == TensorProto.BFLOAT16 for tensor in as_fp32.graph.initializer)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    (y,) = open_session(twin).run(["y"], {"x": x})
    expected = torch.from_numpy(x) @ weights["linear.weight"].T + weights["linear.bias"]
    assert np.abs(y - expected.numpy()).max() < 1e-6
