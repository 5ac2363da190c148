"""The GEGLU kernel without a GPU: in Triton's interpreter, compiled for GPUs that are not here, and its launcher."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor

from tests.kernels.mlp_cases import TOLERANCE, error, geglu_inputs

triton = pytest.importorskip("triton", reason="needs Triton")

from storyadapter.kernels import geglu, launching  # noqa: E402
from storyadapter.kernels.geglu import (  # noqa: E402
    check_geglu_arguments,
    geglu_kernel,
    geglu_triton,
    interleave_geglu,
    launch_geglu,
)
from storyadapter.kernels.grca.aot import SHARED_MEMORY_LIMIT  # noqa: E402
from storyadapter.kernels.tiles import GEGLU as TABLE  # noqa: E402
from storyadapter.kernels.tiles import GegluTiles  # noqa: E402
from tests.kernels.interpreter_process import interpret  # noqa: E402
from tests.kernels.mlp_compilation import (  # noqa: E402
    AbsentDriver,
    captured_graph,
    compile_for,
    registers_and_stack,
)
from tests.kernels.mlp_interpreted import GEGLU_CASES, GEGLU_VARIANTS  # noqa: E402

DTYPES = (torch.float32, torch.float16)
TARGETS = (80, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computed, in one process."""
    return interpret("tests.kernels.mlp_interpreted", "geglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [name for name in GEGLU_CASES if name != "no rows"])
def test_parity(interpreted: dict[str, Any], case: str, dtype: torch.dtype) -> None:
    assert interpreted["parity"][str(dtype)][case] < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", GEGLU_VARIANTS)
def test_variants_write_every_element_and_nothing_else(interpreted: dict[str, Any], variant: str) -> None:
    assert interpreted["variants"][variant]["error"] < TOLERANCE[torch.float32]
    assert interpreted["variants"][variant]["untouched"]


def test_gelu_is_the_erf_form(interpreted: dict[str, Any]) -> None:
    found = interpreted["gelu"]
    assert found["relative"] < 7e-6  # the tanh form is off by 1e-2 and more of itself
    assert found["absolute below -5.5"] < 1e-12
    assert found["extremes"] == pytest.approx([0.0, 0.0, 0.0, 1e30])


def test_interleaved_rows_are_those_of_diffusers() -> None:
    layer = GEGLU(32, 48)
    weight, bias = interleave_geglu(layer.proj.weight.detach(), layer.proj.bias.detach())
    x = torch.randn(5, 32)
    runs = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (-1, 2, 8))
    out = (runs[:, :, 0] * torch.nn.functional.gelu(runs[:, :, 1])).flatten(1)
    assert weight.is_contiguous() and bias.is_contiguous()
    assert error(out, layer(x).detach()) < 1e-6


def test_interleaving_loses_nothing() -> None:
    weight = torch.arange(64 * 16.0).view(64, 16)
    mixed, bias = interleave_geglu(weight, weight[:, 0])
    assert torch.equal(mixed[:, 0], bias)
    assert torch.equal(mixed.unflatten(0, (-1, 2, 8)).transpose(0, 1).flatten(0, 2), weight)


@pytest.mark.parametrize(
    ("weight", "bias", "text"),
    [
        ((40, 16), (40,), "weight is of shape [40, 16]; expected [2·N, K] with N a multiple of 16"),
        ((64,), (64,), "weight is of shape [64]; expected [2·N, K] with N a multiple of 16"),
        ((64, 16), (32,), "bias is of shape [32]; expected [64]"),
    ],
)
def test_only_a_geglu_projection_is_interleaved(weight: tuple[int, ...], bias: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError) as raised:
        interleave_geglu(torch.zeros(weight), torch.zeros(bias))
    assert str(raised.value) == f"interleave_geglu: {text}"


@pytest.mark.parametrize(
    ("index", "change", "text"),
    [
        (0, lambda t: t[None], "x is of shape [1, 8, 32]; expected [M, K] with K a multiple of 16"),
        (0, lambda t: t[:, :24], "x is of shape [8, 24]; expected [M, K] with K a multiple of 16"),
        (0, lambda t: t.double(), "x is torch.float64; expected float16, bfloat16 or float32"),
        (0, lambda t: t.T.contiguous().T, "x is of strides [1, 8]; expected a contiguous tensor"),
        (1, lambda t: t[:, :16], "weight is of shape [96, 16]; expected [2·N, K] with K = 32"),
        (1, lambda t: t[:80], "weight is of shape [80, 32]; expected [2·N, K] with N a multiple of 16"),
        (1, lambda t: t.half(), "weight is torch.float16; expected the dtype of x, torch.float32"),
        (1, lambda t: t.to("meta"), "weight is on meta; expected the device of x, cpu"),
        (2, lambda t: t[:32], "bias is of shape [32]; expected [2·N] = [96]"),
        (2, lambda t: t.repeat(2)[::2], "bias is of strides [2]; expected a contiguous tensor"),
        (2, lambda t: t, "x is on cpu; expected a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"),
    ],
)
def test_bad_arguments_are_named(index: int, change: Any, text: str) -> None:
    arguments = list(geglu_inputs(8, 32, 48, torch.float32))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        check_geglu_arguments(*arguments)
    assert str(raised.value) == f"geglu_triton: {text}"


def test_shapes_without_data() -> None:
    out = geglu_triton(*(tensor.to("meta") for tensor in geglu_inputs(8, 32, 48, torch.float16)))
    assert out.shape == (8, 48) and out.dtype == torch.float16 and out.device.type == "meta"


@pytest.mark.parametrize("descriptors", [False, True])
def test_compilers_see_that_the_output_alone_is_written(descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # an output that isn't seen is dropped from the graph with its kernel; an input taken for one is copied
    tiles = GegluTiles(128, 256, 64, 8, 8, 4, persistent=True, descriptors=descriptors)
    monkeypatch.setattr(geglu, "GEGLU", SimpleNamespace(choose=lambda *_: (tiles, True)))
    monkeypatch.setattr(launching, "interpreted", lambda _: True)  # lets a fake CPU tensor stand for a CUDA one
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDriver())

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.storyadapter.geglu_triton(x * 2, weight, bias) + 1

    graph = captured_graph(layer, geglu_inputs(300, 640, 256, torch.float16))
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(nodes) == 1
    assert nodes[0].kwargs["tensors_to_clone"] == ["out"]
    assert set(nodes[0].kwargs["tma_descriptor_metadata"]) == ({"x", "weight"} if descriptors else set())
    assert nodes[0].kwargs["kwargs"]["K"] == 640 and nodes[0].kwargs["kwargs"]["N"] == 256


def _compiled(tiles: GegluTiles, capability: int, element_type: str, depth: int, width: int) -> Any:
    blocks = {"x": (tiles.block_m, tiles.block_k), "weight": (tiles.block_n, tiles.block_k)}
    constants = {"K": depth, "N": width, **tiles.constants()}
    options = tiles.options()
    return compile_for(
        geglu_kernel, constants, capability, element_type, options, blocks if tiles.descriptors else None
    )


@pytest.mark.parametrize("capability", TARGETS)
def test_stored_tiles_compile_without_spilling(capability: int) -> None:
    for depth, width in ((640, 2560), (1280, 5120)):
        tiles, _ = TABLE.choose(capability, 2, depth)
        compiled = _compiled(tiles, capability, "bf16" if capability == 120 else "fp16", depth, width)
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability]
        assert registers_and_stack(compiled)[1] == 0
        if capability == 90:
            assert "wgmma.mma_async" in compiled.asm["ptx"]


def test_tiles_for_fp32_fit_the_smallest_shared_memory() -> None:
    tiles, tuned = TABLE.choose(89, 4, 640)
    assert not tuned
    assert _compiled(tiles, 89, "fp32", 640, 2560).metadata.shared <= SHARED_MEMORY_LIMIT[89]


def _specialization(rows: int, depth: int) -> tuple[Any, ...]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    bind = create_function_from_signature(
        geglu_kernel.signature, geglu_kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    x, weight, bias = geglu_inputs(rows, depth, 32, torch.float16)
    tiles, _ = TABLE.choose(80, 2, depth)
    keywords = {**geglu.geglu_constants(x, weight, tiles), **tiles.options()}
    _, specialization, options = bind(x.new_empty(rows, 32), x, weight, bias, rows, **keywords)
    return tuple(specialization), tuple(sorted(options.items()))


def test_one_compilation_over_row_counts() -> None:
    assert len({_specialization(rows, 64) for rows in (1, 2, 16, 77, 4096)}) == 1
    assert len({_specialization(16, depth) for depth in (64, 80)}) == 2  # the count can see a second


def test_launcher_counts_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(geglu, "launch", lambda kernel, grid, *_: grids.append(grid))
    x, weight, bias = geglu_inputs(130, 32, 48, torch.float16)
    for persistent in (False, True):
        tiles = GegluTiles(64, 32, 32, 8, 4, 2, persistent, descriptors=False)
        launch_geglu(x, weight, bias, x.new_empty(130, 48), tiles, programs=132)
    assert grids == [(9, 1, 1), (132, 1, 1)]
