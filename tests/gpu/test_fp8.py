"""The fp8 products and the group norm on a GPU: parity, saturation, NaN, and the ways in which PyTorch runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.fp8_cases import (
    E4M3,
    E4M3_TOLERANCE,
    PRODUCT_TOLERANCE,
    convolution_inputs,
    convolution_reference,
    gated,
    group_norm_inputs,
    group_norm_reference,
    linear_inputs,
    linear_reference,
    rows_interleaved,
)
from tests.kernels.grca_cases import Case
from tests.kernels.grca_cases import inputs as grca_inputs
from tests.kernels.grca_cases import reference as grca_reference
from tests.kernels.mlp_cases import TOLERANCE, error, norm_inputs, norm_reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA GPU with fp8"
)
pytest.importorskip("triton", reason="needs Triton")

if torch.cuda.is_available():
    from storyadapter.kernels.grca.launch import grca_triton
    from storyadapter.kernels.group_norm import group_norm_triton
    from storyadapter.kernels.launching import capability
    from storyadapter.kernels.layer_norm import add_layer_norm_triton
    from storyadapter.kernels.products_fp8 import (
        convolution_fp8_triton,
        geglu_fp8_triton,
        launch_product,
        linear_fp8_triton,
    )
    from storyadapter.kernels.tiles import ProductTiles

# B, h, w, C, N, stride
CONVOLUTIONS = [
    (2, 32, 32, 1280, 1280, 1),
    (1, 128, 128, 960, 320, 1),
    (2, 64, 64, 640, 640, 2),
    (3, 33, 17, 320, 640, 1),
    (2, 34, 18, 320, 320, 2),
    (1, 128, 128, 512, 512, 1),  # of a VAE
    (1, 256, 256, 512, 256, 1),
    (1, 512, 512, 128, 128, 1),
    (2, 5, 7, 32, 48, 1),
    (1, 1, 1, 16, 16, 1),
]
LINEAR = [(4096, 1280, 1280), (2048, 5120, 1280), (1000, 640, 1920), (37, 48, 64), (1, 16, 32)]
NAN = 0x7F


def _e4m3(reference: Tensor) -> Tensor:
    return reference.float().clamp(-448, 448).to(E4M3)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case: tuple[int, ...]) -> None:
    arguments, stride = convolution_inputs(*case, "cuda"), case[-1]
    expected = convolution_reference(*arguments, stride)
    assert error(convolution_fp8_triton(*arguments, stride), expected) < PRODUCT_TOLERANCE
    x, weight, scale, shift, _ = arguments
    plain = convolution_fp8_triton(x, weight, scale, shift[0].contiguous(), None, stride)
    assert error(plain, convolution_reference(x, weight, scale, shift[0], None, stride)) < PRODUCT_TOLERANCE


def test_a_convolution_that_writes_bfloat16() -> None:
    x, weight, scale, shift, residual = convolution_inputs(1, 64, 48, 256, 128, 1, "cuda")
    shift, residual = shift[0].bfloat16(), residual.bfloat16()
    out = convolution_fp8_triton(x, weight, scale, shift, residual, 1)
    expected = convolution_reference(x, weight, scale, shift, residual, 1)
    assert out.dtype == torch.bfloat16 and error(out, expected) < 8 * PRODUCT_TOLERANCE  # three bits fewer than fp16


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("descriptors", [False, True])
def test_every_element_is_written_and_nothing_else(descriptors: bool, persistent: bool) -> None:
    if descriptors and capability(torch.device("cuda")) < 90:
        pytest.skip("needs compute capability 9.0 or later")
    arguments = convolution_inputs(3, 33, 17, 80, 144, 1, "cuda")
    x, weight, scale, shift, residual = arguments
    guarded = torch.full((7, *residual.shape[1:]), float("nan"), dtype=torch.float16, device="cuda")
    tiles = ProductTiles(8, 16, 128, 64, 2, 8, 3, persistent, descriptors)
    launch_product(x, weight, scale, shift, guarded[2:-2], tiles, 7, residual=residual)
    assert error(guarded[2:-2], convolution_reference(*arguments, 1)) < PRODUCT_TOLERANCE
    assert guarded[:2].isnan().all() and guarded[-2:].isnan().all()


@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear_and_geglu(shape: tuple[int, int, int]) -> None:
    arguments = linear_inputs(*shape, "cuda")
    assert error(linear_fp8_triton(*arguments), linear_reference(*arguments)) < PRODUCT_TOLERANCE
    x, weight, scale, shift, _ = arguments
    mixed = (rows_interleaved(weight.view(torch.uint8)).view(E4M3), *map(rows_interleaved, (scale, shift)))
    out = geglu_fp8_triton(x, *mixed, torch.full((1,), 8.0, device="cuda"))
    expected = 8 * gated(linear_reference(x, weight, scale, shift, None))
    assert error(out, _e4m3(expected)) < E4M3_TOLERANCE / 2  # here and there another of two neighbours
    saturated = geglu_fp8_triton(x, *mixed, torch.full((1,), 1e6, device="cuda")).float()
    assert saturated.abs().max() == 448 and not saturated.isnan().any()


@pytest.mark.parametrize("text_tokens", [77, 231])
def test_text_and_reference_attention(text_tokens: int) -> None:
    arguments = grca_inputs(Case(4, 1000, 10, 64, text_tokens, 64, (4, 64)), torch.float16, "cuda")
    out, large = (grca_triton(*arguments, torch.full((1,), factor, device="cuda")) for factor in (32.0, 1e6))
    expected = grca_reference(arguments)
    assert error(out, _e4m3(32 * expected)) < E4M3_TOLERANCE / 2  # here and there another of two neighbours
    assert large.float().abs().max() == 448 and not large.float().isnan().any()
    arguments[0][1, 5, 2] = float("nan")
    isnan = grca_triton(*arguments, torch.ones(1, device="cuda")).float().isnan()
    assert isnan[1, 5, 2].all() and isnan.sum() == 64


def test_nan_stays_where_it_was() -> None:
    x, weight, scale, shift, _ = linear_inputs(64, 640, 64, "cuda")
    x.view(torch.uint8)[5, 7] = NAN
    assert linear_fp8_triton(x, weight, scale, shift, None).isnan().all(1).nonzero().flatten().tolist() == [5]
    assert geglu_fp8_triton(x, weight, scale, shift, scale[:1]).float().isnan().all(1).nonzero().flatten().tolist() == [
        5
    ]
    pictures, window, scale, shift, _ = convolution_inputs(1, 32, 32, 640, 64, 1, "cuda")
    pictures.view(torch.uint8)[0, 0, 31, 7] = NAN
    out = convolution_fp8_triton(pictures, window, scale, shift, None, 1)
    assert out.isnan().all(3).nonzero().tolist() == [[0, 0, 30], [0, 0, 31], [0, 1, 30], [0, 1, 31]]
    normed, weight, bias = group_norm_inputs(2, 8, 8, 64, torch.float16, "cuda")
    normed[0, 1, 2, 3] = float("nan")
    of_norm = group_norm_triton(normed, weight, bias, 32, 1e-5, True, torch.full((1,), 1e6, device="cuda"), False)
    assert of_norm[0].float().isnan()[..., 2:4].all() and of_norm.float().isnan().sum() == 8 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 1, 96), (2, 33, 17, 1920), (16, 32, 32, 1280), (3, 128, 128, 320)], ids=str)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = group_norm_inputs(*shape, dtype, "cuda")
    for silu in (False, True):
        expected = group_norm_reference(x, weight, bias, 32, 1e-5, silu)
        assert error(group_norm_triton(x, weight, bias, 32, 1e-5, silu, None, False), expected) < TOLERANCE[dtype]
    rounded = group_norm_triton(x, weight, bias, 32, 1e-5, True, torch.full((1,), 50.0, device="cuda"), True)
    assert error(rounded, _e4m3(50 * expected).flatten(0, 2)) < E4M3_TOLERANCE / 20


def test_layer_norm() -> None:
    x, residual, weight, bias = norm_inputs(1000, 640, torch.float16, "cuda")
    total, normed = add_layer_norm_triton(x, residual, weight * 100, bias * 100, 1e-5, True)
    assert torch.equal(total, x + residual)
    expected = norm_reference(total, weight * 100, bias * 100, 1e-5)
    assert error(normed, _e4m3(expected)) < E4M3_TOLERANCE / 20


def test_aot_inductor_package(tmp_path: Path) -> None:
    # a process of its own: a package that crashes when loaded must not take the other tests with it
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.aot_inductor_fp8_program", str(tmp_path / "layer.pt2")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.splitlines()]
    assert len(errors) == 3 and max(errors) < 2 * PRODUCT_TOLERANCE


def test_cuda_graph_replays_with_new_values() -> None:
    static = convolution_inputs(2, 16, 24, 320, 320, 1, "cuda")
    convolution_fp8_triton(*static, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = convolution_fp8_triton(*static, 1)
    for target, source in zip(static, convolution_inputs(2, 16, 24, 320, 320, 1, "cuda", seed=7), strict=True):
        target.copy_(source)
    out.fill_(float("nan"))
    graph.replay()
    assert error(out, convolution_reference(*static, 1)) < PRODUCT_TOLERANCE
