"""The fused addition and layer norm on a GPU: parity, and the ways in which PyTorch runs it."""

import pytest
import torch

from tests.kernels.mlp_cases import TOLERANCE, error, norm_inputs, norm_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytest.importorskip("triton", reason="needs Triton")

if torch.cuda.is_available():
    from storyadapter.kernels.layer_norm import add_layer_norm_triton, launch_layer_norm
    from storyadapter.kernels.tiles import LAYER_NORM

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(16 * 4096, 640), (16 * 1024, 1280), (2 * 1008, 1280), (576, 640), (1, 16), (77, 48), (1023, 656), (5, 4096)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight, bias = norm_inputs(*shape, dtype, "cuda")
    total, normed = add_layer_norm_triton(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert error(normed, norm_reference(total, weight, bias, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("channels", [640, 656])
def test_every_element_is_written_and_nothing_else(channels: int) -> None:
    x, residual, weight, bias = norm_inputs(131, channels, torch.float16, "cuda")
    guarded = [torch.full((135, channels), float("nan"), dtype=torch.float16, device="cuda") for _ in range(2)]
    tiles, _ = LAYER_NORM.choose(90, 2, 640)
    launch_layer_norm(x, residual, weight, bias, 1e-5, *(t[2:-2] for t in guarded), tiles)
    assert torch.equal(guarded[0][2:-2], x + residual)
    expected = norm_reference(x + residual, weight, bias, 1e-5)
    assert error(guarded[1][2:-2], expected) < TOLERANCE[torch.float16]
    assert all(t[:2].isnan().all() and t[-2:].isnan().all() for t in guarded)


def test_torch_compile_sees_through_without_a_break() -> None:
    def layer(*arguments: torch.Tensor) -> torch.Tensor:
        total, normed = torch.ops.storyadapter.add_layer_norm_triton(*arguments, 1e-5)
        return total * 2 + normed

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (300, 128):
        arguments = norm_inputs(rows, 640, torch.float16, "cuda")
        total = arguments[0] + arguments[1]
        expected = 2 * total.double() + norm_reference(total, *arguments[2:], 1e-5)
        assert error(compiled(*arguments), expected) < 2 * TOLERANCE[torch.float16]


def test_cuda_graph_replays_with_new_values() -> None:
    static = norm_inputs(1000, 1280, torch.float16, "cuda")
    add_layer_norm_triton(*static, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, normed = add_layer_norm_triton(*static, 1e-5)
    for target, source in zip(static, norm_inputs(1000, 1280, torch.float16, "cuda", seed=7), strict=True):
        target.copy_(source)
    total.fill_(float("nan"))
    normed.fill_(float("nan"))
    graph.replay()
    assert torch.equal(total, static[0] + static[1])
    assert error(normed, norm_reference(total, *static[2:], 1e-5)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda tensor: tensor.repeat(1, 2)[:, ::2], "x"),
        (1, lambda tensor: tensor[:-1], "residual"),
        (2, lambda tensor: tensor.float(), "weight"),
        (3, lambda tensor: tensor.cpu(), "bias"),
    ],
)
def test_bad_arguments_are_named(index: int, change, name: str) -> None:
    arguments = list(norm_inputs(32, 48, torch.float16, "cuda"))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=f"add_layer_norm_triton: {name} is "):
        add_layer_norm_triton(*arguments, 1e-5)
