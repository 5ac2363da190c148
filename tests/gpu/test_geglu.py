"""The GEGLU kernel on a GPU: parity, and the ways in which PyTorch runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GEGLU

from tests.kernels.mlp_cases import TOLERANCE, error, geglu_inputs, geglu_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton = pytest.importorskip("triton", reason="needs Triton")

if torch.cuda.is_available():
    from storyadapter.kernels.geglu import geglu_kernel, geglu_triton, interleave_geglu, launch_geglu
    from storyadapter.kernels.launching import capability
    from storyadapter.kernels.tiles import GegluTiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRODUCTION = [(16 * 1024, 1280, 5120), (16 * 4096, 640, 2560), (2 * 1008, 1280, 5120), (576, 640, 2560)]
ODD = [(1, 640, 2560), (129, 1280, 5120), (1023, 48, 80), (77, 16, 16), (300, 656, 112)]
LOADS = ("pointers", "descriptors")


def _tiles(loads: str, persistent: bool) -> "GegluTiles":
    if loads == "descriptors" and capability(torch.device("cuda")) < 90:
        pytest.skip("needs compute capability 9.0 or later")
    return GegluTiles(128, 128, 64, 8, 8, 2, persistent, descriptors=loads == "descriptors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTION + ODD, ids=str)
def test_parity(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if dtype == torch.float32 and shape[0] > 4096:
        pytest.skip("fp32 is for tests: large products take seconds")
    x, weight, bias = geglu_inputs(*shape, dtype, "cuda")
    out = geglu_triton(x, *interleave_geglu(weight, bias))
    for some, rows in ((out[:2048], x[:2048]), (out[-100:], x[-100:])):
        assert error(some, geglu_reference(rows, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("shape", [(1000, 640, 2560), (129, 80, 112)], ids=str)
def test_every_element_is_written_and_nothing_else(shape: tuple[int, int, int], loads: str, persistent: bool) -> None:
    x, weight, bias = geglu_inputs(*shape, torch.float16, "cuda")
    guarded = torch.full((shape[0] + 4, shape[2]), float("nan"), dtype=torch.float16, device="cuda")
    launch_geglu(x, *interleave_geglu(weight, bias), guarded[2:-2], _tiles(loads, persistent), programs=7)
    assert error(guarded[2:-2], geglu_reference(x, weight, bias)) < TOLERANCE[torch.float16]
    assert guarded[:2].isnan().all() and guarded[-2:].isnan().all()


def test_replaces_the_layer_of_diffusers() -> None:
    layer = GEGLU(640, 2560).cuda().half()
    x = torch.randn(3, 77, 640, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = layer.float()(x.float())
        weight, bias = interleave_geglu(layer.half().proj.weight, layer.proj.bias)
        assert error(geglu_triton(x.flatten(0, 1), weight, bias).view(3, 77, 2560), expected) < TOLERANCE[torch.float16]


def test_the_tanh_form_would_be_noticed() -> None:
    x, weight, bias = geglu_inputs(512, 640, 2560, torch.float32, "cuda")
    value, gate = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
    approximate = value * torch.nn.functional.gelu(gate, approximate="tanh")
    assert error(geglu_triton(x, *interleave_geglu(weight, bias)), approximate) > 10 * TOLERANCE[torch.float32]


def test_one_compilation_over_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def count(*_: object, **keywords: object) -> None:
        compiled.append(str(keywords.get("repr")))

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    geglu_kernel.device_caches.clear()
    for rows in (1, 16, 77, 4096, 65536):
        x, weight, bias = geglu_inputs(rows, 640, 2560, torch.float16, "cuda")
        geglu_triton(x, *interleave_geglu(weight, bias))
    assert len(compiled) == 1


def test_torch_compile_sees_through_without_a_break() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.storyadapter.geglu_triton(x * 2, weight, bias).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (300, 128):
        x, weight, bias = geglu_inputs(rows, 640, 2560, torch.float16, "cuda")
        expected = geglu_reference(x * 2, weight, bias).relu()
        assert error(compiled(x, *interleave_geglu(weight, bias)), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("loads", LOADS)
def test_aot_inductor_package(loads: str, tmp_path: Path) -> None:
    _tiles(loads, persistent=True)  # skips where the GPU has no descriptors
    # a process of its own: a package that crashes when loaded must not take the other tests with it
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.aot_inductor_mlp_program", str(tmp_path / "layer.pt2"), loads],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    # the rounded norm may differ from the reference's by one unit here and there
    assert len(lines) == 3 and all(total == 0 and out < 3 * TOLERANCE[torch.float16] for total, out in lines)


@pytest.mark.parametrize("loads", LOADS)
def test_cuda_graph_replays_with_new_values(loads: str) -> None:
    x, weight, bias = geglu_inputs(1000, 640, 2560, torch.float16, "cuda")
    mixed = interleave_geglu(weight, bias)
    out = torch.empty(1000, 2560, dtype=torch.float16, device="cuda")
    tiles = _tiles(loads, True)
    launch_geglu(x, *mixed, out, tiles, programs=132)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_geglu(x, *mixed, out, tiles, programs=132)
    x.copy_(geglu_inputs(1000, 640, 2560, torch.float16, "cuda", seed=7)[0])
    out.fill_(float("nan"))
    graph.replay()
    assert error(out, geglu_reference(x, weight, bias)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda tensor: tensor.repeat(1, 2)[:, ::2], "x"),
        (1, lambda tensor: tensor.cpu(), "weight"),
        (1, lambda tensor: tensor.float(), "weight"),
        (2, lambda tensor: tensor[:-32], "bias"),
    ],
)
def test_bad_arguments_are_named(index: int, change, name: str) -> None:
    arguments = list(geglu_inputs(32, 48, 64, torch.float16, "cuda"))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=f"geglu_triton: {name} is "):
        geglu_triton(*arguments)
