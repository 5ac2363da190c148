"""The group norm, and the layer norm that writes e4m3, without a GPU: in the interpreter, and the launcher."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.fp8_cases import E4M3_TOLERANCE, group_norm_inputs
from tests.kernels.mlp_cases import TOLERANCE

triton = pytest.importorskip("triton", reason="needs Triton")

from storyadapter.kernels import launching  # noqa: E402
from storyadapter.kernels.group_norm import group_norm_triton  # noqa: E402
from tests.kernels.fp8_interpreted import NORM_VARIANTS  # noqa: E402
from tests.kernels.interpreter_process import interpret  # noqa: E402
from tests.kernels.mlp_compilation import AbsentDriver, captured_graph  # noqa: E402


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computed, in one process."""
    return interpret("tests.kernels.fp8_interpreted", "group_norm", "layer_norm")


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parity(interpreted: dict[str, Any], dtype: torch.dtype, silu: bool) -> None:
    assert interpreted["group_norm"][f"{dtype} {silu}"] < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("variant", NORM_VARIANTS)
def test_variants_write_every_element_and_nothing_else(interpreted: dict[str, Any], variant: str) -> None:
    found = interpreted["group_norm"]["variants"][variant]
    assert found["error"] < TOLERANCE[torch.float16] and found["untouched"]


@pytest.mark.parametrize("kernel", ["group_norm", "layer_norm"])
def test_results_in_e4m3_saturate(interpreted: dict[str, Any], kernel: str) -> None:
    assert interpreted[kernel]["e4m3"] < 4 * E4M3_TOLERANCE  # cut off instead of rounded
    assert interpreted[kernel]["saturated"] == 448


def test_e4m3_is_written_of_bfloat16(interpreted: dict[str, Any]) -> None:
    assert interpreted["group_norm"]["e4m3 of bfloat16"] < 4 * E4M3_TOLERANCE


@pytest.mark.parametrize(
    ("index", "change", "text"),
    [
        (0, lambda t: t[0], "x is of shape [4, 6, 64]; expected [B, h, w, C] with C a multiple of 16"),
        (0, lambda t: t[..., :24], "x is of shape [2, 4, 6, 24]; expected [B, h, w, C] with C a multiple of 16"),
        (0, lambda t: t.double(), "x is torch.float64; expected float16, bfloat16 or float32"),
        (0, lambda t: t.transpose(1, 2), "x is of strides [1536, 64, 384, 1]; expected a contiguous tensor"),
        (1, lambda t: t[:16], "weight is of shape [16]; expected [C] = [64]"),
        (2, lambda t: t.float(), "bias is torch.float32; expected the dtype of x, torch.float16"),
        (3, lambda _: 24, "groups is 24; expected a divisor of C = 64"),
        (4, lambda _: 0.0, "eps is 0.0; expected a number over 0"),
        (6, lambda _: torch.ones(2), "factor is torch.float32 [2] on cpu; expected float32 [1] with x"),
        (0, lambda t: t, "x is on cpu; expected a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"),
    ],
)
def test_bad_arguments_are_named(index: int, change: Any, text: str) -> None:
    arguments: list[Any] = [*group_norm_inputs(2, 4, 6, 64, torch.float16), 32, 1e-5, True, None, False]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        group_norm_triton(*arguments)
    assert str(raised.value) == f"group_norm_triton: {text}"


def test_shapes_without_data() -> None:
    x, weight, bias = (t.to("meta") for t in group_norm_inputs(2, 4, 6, 64, torch.float16))
    pictures = group_norm_triton(x, weight, bias, 32, 1e-5, True, None, False)
    assert pictures.shape == x.shape and pictures.dtype == torch.float16
    tokens = group_norm_triton(x, weight, bias, 32, 1e-5, False, torch.ones(1, device="meta"), True)
    assert tokens.shape == (48, 64) and tokens.dtype == torch.float8_e4m3fn


def test_compilers_see_that_the_outputs_alone_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "interpreted", lambda _: True)  # lets a CPU tensor stand for a CUDA one
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDriver())

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.storyadapter.group_norm_triton(x * 2, weight, bias, 32, 1e-5, True, None, False) + 1

    graph = captured_graph(layer, group_norm_inputs(3, 8, 12, 64, torch.float16))
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in nodes] == [["moments"], ["factors"], ["out"]]
