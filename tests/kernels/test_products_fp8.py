"""The fp8 products without a GPU: in Triton's interpreter, compiled for GPUs that are not here, and their launchers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.fp8_cases import (
    E4M3,
    E4M3_TOLERANCE,
    PRODUCT_TOLERANCE,
    convolution_inputs,
    linear_inputs,
    rows_interleaved,
)

triton = pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from storyadapter.kernels import launching, products_fp8  # noqa: E402
from storyadapter.kernels.geglu import interleave_geglu  # noqa: E402
from storyadapter.kernels.grca.aot import SHARED_MEMORY_LIMIT  # noqa: E402
from storyadapter.kernels.products_fp8 import (  # noqa: E402
    convolution_fp8_triton,
    geglu_fp8_triton,
    linear_fp8_triton,
    product_fp8_kernel,
)
from storyadapter.kernels.tiles import CONVOLUTION_FP8, GEGLU_FP8, LINEAR_FP8, ProductTiles  # noqa: E402
from tests.kernels.fp8_interpreted import CONVOLUTIONS, PRODUCT_VARIANTS  # noqa: E402
from tests.kernels.interpreter_process import interpret  # noqa: E402
from tests.kernels.mlp_compilation import AbsentDriver, captured_graph, registers_and_stack  # noqa: E402


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computed, in one process."""
    return interpret("tests.kernels.fp8_interpreted", "products")["products"]


@pytest.mark.parametrize("case", [*CONVOLUTIONS, "linear"])
def test_parity(interpreted: dict[str, Any], case: str) -> None:
    assert interpreted[case] < PRODUCT_TOLERANCE


def test_what_is_added_and_written_may_be_bfloat16(interpreted: dict[str, Any]) -> None:
    assert interpreted["bfloat16"] < 8 * PRODUCT_TOLERANCE  # three bits fewer than fp16


def test_a_gated_product_is_rounded_to_e4m3_and_saturates(interpreted: dict[str, Any]) -> None:
    assert interpreted["geglu"] < 4 * E4M3_TOLERANCE  # cut off instead of rounded
    assert interpreted["saturated"] == 448
    assert interpreted["no rows"] == [0, 64]


@pytest.mark.parametrize("product", ["convolution", "linear"])
@pytest.mark.parametrize("variant", PRODUCT_VARIANTS)
def test_variants_write_every_element_and_nothing_else(interpreted: dict[str, Any], variant: str, product: str) -> None:
    found = interpreted["variants"][variant][product]
    assert found["error"] < PRODUCT_TOLERANCE and found["untouched"]


def test_rows_are_interleaved_as_for_the_other_geglu() -> None:
    weight = torch.arange(64 * 16.0).view(64, 16)
    mixed, bias = interleave_geglu(weight, weight[:, 0])
    assert torch.equal(rows_interleaved(weight), mixed) and torch.equal(rows_interleaved(weight[:, 0]), bias)


CONVOLUTION_REFUSALS = [
    (0, lambda t: t[0], "x is of shape [4, 6, 32]; expected [B, h, w, C]"),
    (0, lambda t: t.half(), "x is torch.float16; expected float8_e4m3fn"),
    (0, lambda t: t[..., :24], "x is of shape [2, 4, 6, 24]; expected a multiple of 16 in the last dimension"),
    (0, lambda t: t.transpose(1, 2), "x is of strides [768, 32, 192, 1]; expected a contiguous tensor"),
    (1, lambda t: t[:, :32], "weight is of shape [48, 32]; expected [N, 288] with N a multiple of 16"),
    (1, lambda t: t[:40], "weight is of shape [40, 288]; expected [N, 288] with N a multiple of 16"),
    (2, lambda t: t.half(), "scale is torch.float16 of shape [48]; expected float32 [48]"),
    (2, lambda t: t.to("meta"), "scale is on meta; expected the device of x, cpu"),
    (3, lambda t: t.double(), "shift is torch.float64; expected float16, bfloat16 or float32"),
    (4, lambda t: t.float(), "residual is torch.float32; expected the dtype of shift, torch.float16"),
    (5, lambda _: 3, "stride is 3; expected 1 or 2"),
    (0, lambda t: t, "x is on cpu; expected a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"),
]


@pytest.mark.parametrize(("index", "change", "text"), CONVOLUTION_REFUSALS)
def test_bad_arguments_of_a_convolution_are_named(index: int, change: Any, text: str) -> None:
    arguments: list[Any] = [*convolution_inputs(2, 4, 6, 32, 48, 1), 1]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        convolution_fp8_triton(*arguments)
    assert str(raised.value) == f"convolution_fp8_triton: {text}"


@pytest.mark.parametrize(
    ("shape", "index", "change", "stride", "text"),
    [
        ((2, 5, 6), 0, lambda t: t, 2, "x is of shape [2, 5, 6, 32]; expected even h and w with stride 2"),
        ((2, 4, 6), 3, lambda t: t[:1], 1, "shift is of shape [1, 48]; expected [48] or [2, 48]"),
        (
            (2, 4, 6),
            4,
            lambda t: t[:, :2],
            1,
            "residual is of shape [2, 2, 6, 48] and strides [1152, 288, 48, 1]; expected contiguous [2, 4, 6, 48]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape: Any, index: int, change: Any, stride: int, text: str) -> None:
    arguments = [t.to("meta") for t in convolution_inputs(*shape, 32, 48, 1)]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        convolution_fp8_triton(*arguments, stride)
    assert str(raised.value) == f"convolution_fp8_triton: {text}"


def test_bad_arguments_of_matrices_are_named() -> None:
    x, weight, scale, shift, residual = (t.to("meta") for t in linear_inputs(8, 32, 48))
    with pytest.raises(ValueError, match=r"linear_fp8_triton: x is of shape \[1, 8, 32\]; expected \[M, K\]"):
        linear_fp8_triton(x[None], weight, scale, shift, residual)
    with pytest.raises(ValueError, match=r"linear_fp8_triton: shift is of shape \[32\]; expected \[48\]"):
        linear_fp8_triton(x, weight, scale, shift[:32], None)
    with pytest.raises(ValueError, match=r"linear_fp8_triton: residual is of shape \[7, 48\] and strides \[48, 1\]"):
        linear_fp8_triton(x, weight, scale, shift, residual[:7])
    with pytest.raises(ValueError, match=r"geglu_fp8_triton: weight is of shape \[48, 32\]; expected \[2·N, K\]"):
        geglu_fp8_triton(x, weight, scale, shift, scale[:1])
    with pytest.raises(ValueError, match=r"geglu_fp8_triton: factor is torch.float32 of shape \[2\]"):
        geglu_fp8_triton(x, weight[:32], scale[:32], shift[:32], scale[:2])


def test_shapes_without_data() -> None:
    x, weight, scale, shift, residual = (t.to("meta") for t in convolution_inputs(2, 4, 6, 32, 64, 2))
    out = convolution_fp8_triton(x, weight, scale, shift, residual, 2)
    assert out.shape == (2, 2, 3, 64) and out.dtype == torch.float16 and out.device.type == "meta"
    x, weight, scale, shift, _ = (t.to("meta") for t in linear_inputs(8, 32, 64))
    out = geglu_fp8_triton(x, weight, scale, shift, scale[:1])
    assert out.shape == (8, 32) and out.dtype == E4M3


@pytest.mark.parametrize("descriptors", [False, True])
def test_compilers_see_that_the_output_alone_is_written(descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = ProductTiles(8, 16, 128, 64, 8, 8, 3, persistent=True, descriptors=descriptors)
    monkeypatch.setattr(products_fp8, "CONVOLUTION_FP8", SimpleNamespace(choose=lambda *_: (tiles, True)))
    monkeypatch.setattr(launching, "interpreted", lambda _: True)  # lets a fake CPU tensor stand for a CUDA one
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDriver())

    def layer(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.storyadapter.convolution_fp8_triton(x, weight, scale, shift * 2, residual, 1) + 1

    graph = captured_graph(layer, convolution_inputs(3, 8, 12, 64, 128, 1))
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(nodes) == 1
    assert nodes[0].kwargs["tensors_to_clone"] == ["out"]
    assert set(nodes[0].kwargs["tma_descriptor_metadata"]) == ({"x", "weight"} if descriptors else set())


def _compiled(
    tiles: ProductTiles, capability: int, side: int, channels: int, columns: int, gated: bool, half: str = "fp16"
) -> Any:
    constants = {"C": channels, "N": columns, "SIDE": side, "STRIDE": 1, "SHIFTS": side == 3, "GATED": gated}
    constants |= {"RESIDUAL": side == 3, **tiles.constants()}
    pixels = [1, tiles.block_h, tiles.block_w] if side == 3 else [tiles.block_w]
    kinds = {"out": "*fp8e4nv" if gated else f"*{half}", "scale": "*fp32", "factor": "*fp32"}
    kinds |= dict.fromkeys(("shift", "residual"), f"*{half}") | dict.fromkeys(("images", "height", "width"), "i32")
    for name, block in (("x", [*pixels, tiles.block_k]), ("weight", [tiles.block_n, tiles.block_k])):
        kinds[name] = f"tensordesc<fp8e4nv{block}>" if tiles.descriptors else "*fp8e4nv"
    index = product_fp8_kernel.arg_names.index
    signature = {name: "constexpr" if name in constants else kinds[name] for name in product_fp8_kernel.arg_names}
    source = ASTSource(
        product_fp8_kernel,
        signature,
        {(index(name),): value for name, value in constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tiles.options())


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_stored_tiles_compile_and_spill_next_to_nothing(capability: int) -> None:
    for table, side, channels, columns, gated, half in (
        (CONVOLUTION_FP8, 3, 320, 320, False, "fp16"),
        (CONVOLUTION_FP8, 3, 1280, 1280, False, "fp16"),
        (CONVOLUTION_FP8, 3, 128, 128, False, "bf16"),
        (CONVOLUTION_FP8, 3, 512, 256, False, "bf16"),
        (LINEAR_FP8, 1, 1280, 1280, False, "fp16"),
        (GEGLU_FP8, 1, 1280, 10240, True, "fp16"),
    ):
        tiles, _ = table.choose(capability, 1, columns if side == 3 else channels)
        compiled = _compiled(tiles, capability, side, channels, columns, gated, half)
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability]
        # a thread's part of the scales, shifts and residuals of a large tile is as large as its sums: behind the loop
        # over the depth, some 40 registers of them may go to memory and back
        assert registers_and_stack(compiled)[1] <= 160
        assert "e4m3" in compiled.asm["ptx"]
        if capability == 90:
            assert "wgmma.mma_async" in compiled.asm["ptx"] and "cp.async.bulk.tensor" in compiled.asm["ptx"]


def test_launcher_counts_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(products_fp8, "launch", lambda kernel, grid, *_: grids.append(grid))
    x, weight, scale, shift, residual = convolution_inputs(3, 9, 17, 32, 48, 1)
    for persistent in (False, True):
        tiles = ProductTiles(4, 16, 32, 32, 8, 4, 2, persistent, descriptors=False)
        products_fp8.launch_product(x, weight, scale, shift, residual, tiles, 132, residual=residual)
    rows, weight, scale, shift, out = linear_inputs(130, 32, 48)
    tiles = ProductTiles(1, 64, 32, 32, 8, 4, 2, persistent=False, descriptors=False)
    products_fp8.launch_product(rows, weight, scale, shift, out, tiles, 132)
    assert grids == [(3 * 3 * 2 * 2, 1, 1), (132, 1, 1), (3 * 2, 1, 1)]
