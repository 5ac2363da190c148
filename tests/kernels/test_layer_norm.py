"""The fused addition and layer norm without a GPU: in the interpreter, compiled elsewhere, and the launcher."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.mlp_cases import TOLERANCE, norm_inputs

triton = pytest.importorskip("triton", reason="needs Triton")

from storyadapter.kernels import launching  # noqa: E402
from storyadapter.kernels.grca.aot import SHARED_MEMORY_LIMIT  # noqa: E402
from storyadapter.kernels.layer_norm import (  # noqa: E402
    add_layer_norm_kernel,
    add_layer_norm_triton,
    channel_blocks,
    check_layer_norm_arguments,
)
from storyadapter.kernels.tiles import LAYER_NORM  # noqa: E402
from tests.kernels.interpreter_process import interpret  # noqa: E402
from tests.kernels.mlp_compilation import (  # noqa: E402
    AbsentDriver,
    captured_graph,
    compile_for,
    registers_and_stack,
)
from tests.kernels.mlp_interpreted import NORM_CASES, NORM_VARIANTS  # noqa: E402

TARGETS = (80, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computed, in one process."""
    return interpret("tests.kernels.mlp_interpreted", "layer_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NORM_CASES)
def test_parity(interpreted: dict[str, Any], case: str, dtype: torch.dtype) -> None:
    found = interpreted["parity"][str(dtype)][case]
    # the interpreter cuts bf16 off instead of rounding it: twice the error
    tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
    assert found["normed"] < tolerance and found["sum"] < tolerance
    assert found["sum is equal"] or dtype == torch.bfloat16


@pytest.mark.parametrize("variant", NORM_VARIANTS)
def test_variants_write_every_element_and_nothing_else(interpreted: dict[str, Any], variant: str) -> None:
    assert interpreted["variants"][variant]["error"] < TOLERANCE[torch.float32]
    assert interpreted["variants"][variant]["untouched"]


def test_edges(interpreted: dict[str, Any]) -> None:
    assert interpreted["empty"] == [[0, 32], [0, 32]]
    assert interpreted["of a constant"] == 0


@pytest.mark.parametrize(
    ("index", "change", "text"),
    [
        (0, lambda t: t[None], "x is of shape [1, 8, 32]; expected [M, C] with C a multiple of 16 up to 4096"),
        (0, lambda t: t[:, :24], "x is of shape [8, 24]; expected [M, C] with C a multiple of 16 up to 4096"),
        (0, lambda t: t.repeat(1, 256), "x is of shape [8, 8192]; expected [M, C] with C a multiple of 16 up to 4096"),
        (0, lambda t: t.double(), "x is torch.float64; expected float16, bfloat16 or float32"),
        (0, lambda t: t.T.contiguous().T, "x is of strides [1, 8]; expected a contiguous tensor"),
        (1, lambda t: t[:7], "residual is of shape [7, 32]; expected the shape of x, [8, 32]"),
        (1, lambda t: t.half(), "residual is torch.float16; expected the dtype of x, torch.float32"),
        (2, lambda t: t[:16], "weight is of shape [16]; expected [C] = [32]"),
        (2, lambda t: t.to("meta"), "weight is on meta; expected the device of x, cpu"),
        (3, lambda t: t.repeat(2)[::2], "bias is of strides [2]; expected a contiguous tensor"),
        (4, lambda _: 0.0, "eps is 0.0; expected a number over 0"),
        (4, lambda _: float("nan"), "eps is nan; expected a number over 0"),
        (4, lambda t: t, "x is on cpu; expected a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"),
    ],
)
def test_bad_arguments_are_named(index: int, change: Any, text: str) -> None:
    arguments: list[Any] = [*norm_inputs(8, 32, torch.float32), 1e-5]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        check_layer_norm_arguments(*arguments)
    assert str(raised.value) == f"add_layer_norm_triton: {text}"


def test_shapes_without_data() -> None:
    arguments = (tensor.to("meta") for tensor in norm_inputs(8, 32, torch.float16))
    for out in add_layer_norm_triton(*arguments, 1e-5):
        assert out.shape == (8, 32) and out.dtype == torch.float16 and out.device.type == "meta"


def test_compilers_see_that_the_outputs_alone_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "interpreted", lambda _: True)  # lets a CPU tensor stand for a CUDA one
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDriver())

    def layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, normed = torch.ops.storyadapter.add_layer_norm_triton(x * 2, residual, weight, bias, 1e-5)
        return total + normed

    graph = captured_graph(layer, norm_inputs(30, 640, torch.float16))
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in nodes] == [["total", "normed"]]


@pytest.mark.parametrize("capability", TARGETS)
def test_stored_tiles_compile_without_spilling(capability: int) -> None:
    for channels in (640, 1280):
        tiles, _ = LAYER_NORM.choose(capability, 2, channels)
        block, rest = channel_blocks(channels)
        constants = {"EPS": 1e-5, "CHANNELS": channels, "BLOCK": block, "REST": rest, **tiles.constants()}
        element_type = "bf16" if capability == 120 else "fp16"
        compiled = compile_for(add_layer_norm_kernel, constants, capability, element_type, tiles.options())
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability]
        assert registers_and_stack(compiled)[1] == 0
        assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 16 bytes at a time


@pytest.mark.parametrize(
    ("channels", "blocks"),
    [(16, (16, 0)), (640, (512, 128)), (1280, (1024, 256)), (48, (32, 16)), (4080, (2048, 2048))],
)
def test_channels_are_covered_with_little_padding(channels: int, blocks: tuple[int, int]) -> None:
    assert channel_blocks(channels) == blocks
