"""The fused kernel on a GPU: parity, and the ways in which PyTorch runs it."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.grca_cases import TOLERANCE, Case, error, inputs, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton = pytest.importorskip("triton", reason="needs Triton")

if torch.cuda.is_available():
    from storyadapter.kernels.grca.kernel import grca_kernel
    from storyadapter.kernels.grca.launch import grca_triton, launch_arguments
    from storyadapter.kernels.tiles import GRCA, GRCA_EMBEDDED

HALF = (torch.float16, torch.bfloat16)
PRODUCTION = [
    Case(16, 4096, 10, 64, 77, 64, (4, 64)),
    Case(16, 4096, 10, 64, 77, 400, (4, 400)),
    Case(16, 1024, 20, 64, 77, 32, (4, 32)),
    Case(4, 1008, 20, 64, 77, 200, (4, 200)),
    Case(2, 2304, 10, 64, 77, 4, (4, 4)),
    Case(16, 4096, 10, 64, 154, 64, (4, 64)),
    Case(16, 1024, 20, 64, 231, 400, (4, 400)),
]
ODD = [
    Case(3, 1, 2, 64, 77, 1),
    Case(2, 77, 1, 64, 77, 3, (3, 2)),
    Case(2, 1023, 2, 64, 77, 65, (65, 17)),
    Case(2, 130, 2, 64, 77, 1000, (1000, 999, 1)),
    Case(1, 65, 2, 32, 77, 2048),
    Case(2, 100, 2, 32, 5, 65, (16, 33)),
    Case(2, 100, 2, 64, 16, 40, (40, 9)),
    Case(2, 100, 2, 64, 128, 80, (80, 64)),
    Case(2, 100, 2, 64, 154, 80, (80, 48)),
    Case(5, 130, 3, 64, 77, 130, (130, 4, 77), layout="padded"),
    Case(5, 130, 3, 32, 77, 130, (130, 4, 77), layout="sliced"),
    Case(4, 257, 2, 64, 77, 300, (4, 290), poison=True),
    Case(3, 33, 2, 32, 231, 40, (40, 9), layout="sliced"),
]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("case", PRODUCTION + ODD, ids=str)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    arguments = inputs(case, dtype, "cuda")
    clean = arguments
    if case.poison:
        clean = (*arguments[:3], arguments[3].nan_to_num(0.0), *arguments[4:])
    assert error(grca_triton(*arguments), reference(clean)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_scores_of_sixty_stay_finite_and_right(dtype: torch.dtype) -> None:
    # √D = 8: scores are about ±60 at four deviations
    arguments = inputs(Case(2, 256, 2, 64, 77, 100, (100, 3), scale=15**0.5), dtype, "cuda")
    scores = torch.einsum("shd,khd->hsk", arguments[0][0].float(), arguments[1][0, 0].float().unflatten(-1, (2, 64)))
    assert scores.abs().max() / 8 > 55
    assert error(grca_triton(*arguments), reference(arguments)) < TOLERANCE[dtype]


def test_a_score_far_over_the_others_is_right() -> None:
    # one late key outweighs all before it: the fixed shift overflows and the running maximum takes over
    arguments = inputs(Case(4, 200, 2, 64, 77, 300, (4, 300)), torch.float16, "cuda")
    q, _, _, ref_kv, _, _ = arguments
    ref_kv[1, 0, 20, :64] = 20 * q[1, 3, 0] / q[1, 3, 0].norm()
    scores = (q[1, :, 0].float() @ ref_kv[1, 0, :, :64].float().T) / 8
    assert scores[3].argmax() == 20 and scores[3, 20] - scores[3, 256:].max() > 16
    assert error(grca_triton(*arguments), reference(arguments)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("case", [PRODUCTION[0], ODD[2], ODD[9], ODD[11]], ids=str)
@pytest.mark.parametrize("embedded", [False, True])
def test_every_element_is_written_and_nothing_else(case: Case, embedded: bool) -> None:
    arguments = inputs(case, torch.float16, "cuda")
    tiles = (GRCA_EMBEDDED if embedded else GRCA).choose(90, 2, case.head_size)[0]
    rows, tokens, heads, size = arguments[0].shape
    buffer = torch.full((rows, tokens + 2, heads, size), float("nan"), dtype=torch.float16, device="cuda")
    grid, positional, keywords = launch_arguments(*arguments, buffer[:, 1:-1], tiles)
    grca_kernel[grid](*positional, **keywords)
    clean = (*arguments[:3], arguments[3].nan_to_num(0.0), *arguments[4:])
    assert error(buffer[:, 1:-1], reference(clean)) < TOLERANCE[torch.float16]
    assert buffer[:, 0].isnan().all() and buffer[:, -1].isnan().all()


def test_zero_values_contribute_exactly_nothing() -> None:
    arguments = inputs(Case(4, 300, 2, 64, 77, 40, (1, 40)), torch.float16, "cuda")
    arguments[3][:, 1] = 0
    other = inputs(Case(4, 300, 2, 64, 77, 90, (90, 3)), torch.float16, "cuda", seed=1)
    other[3][:, 1] = 0
    out = grca_triton(*arguments)
    assert torch.equal(out, grca_triton(*arguments[:3], other[3], arguments[4], other[5]))


def test_one_compilation_over_reference_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def count(*_: object, **keywords: object) -> None:
        compiled.append(str(keywords.get("repr")))

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    grca_kernel.device_caches.clear()
    for ref_tokens in (1, 4, 12, 16, 400):
        for rows, banks, prompts in ((1, 1, 1), (2, 1, 2), (4, 2, 3), (16, 2, 3)):
            for query_tokens in (256, 1, 100):
                lengths = (1, ref_tokens)[-banks:]
                case = Case(rows, query_tokens, 2, 64, 77, ref_tokens, lengths, prompts=prompts)
                grca_triton(*inputs(case, torch.float16, "cuda"))
    assert len(compiled) == 1


def test_torch_compile_sees_through_without_a_break() -> None:
    def layer(*arguments: torch.Tensor) -> torch.Tensor:
        q, *rest = arguments
        return torch.ops.storyadapter.grca_triton(q * 2, *rest).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for case in (Case(4, 300, 2, 64, 77, 40, (4, 40)), Case(6, 128, 2, 64, 77, 12, (4, 12))):
        arguments = inputs(case, torch.float16, "cuda")
        expected = reference((arguments[0] * 2, *arguments[1:])).relu()
        assert error(compiled(*arguments), expected) < TOLERANCE[torch.float16]


def test_aot_inductor_package(tmp_path: Path) -> None:
    # a process of its own: a package that crashes when loaded must not take the other tests with it
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.aot_inductor_program", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 5 and all(value < TOLERANCE[torch.float16] for value in errors)


def test_cuda_graph_replays_with_new_values() -> None:
    case = Case(4, 512, 2, 64, 77, 40, (4, 40))
    static = inputs(case, torch.float16, "cuda")
    grca_triton(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grca_triton(*static)
    fresh = inputs(case, torch.float16, "cuda", seed=7)
    for target, source in zip(static, fresh, strict=True):
        target.copy_(source)
    static[5].copy_(torch.tensor([3, 21]))  # lengths are read by the kernel, not baked into the graph
    out.fill_(float("nan"))
    graph.replay()
    assert error(out, reference(static)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("control", ["joint softmax", "text rows swapped", "halved references"])
def test_negative_controls_fail_by_a_wide_margin(control: str) -> None:
    arguments = inputs(Case(4, 512, 2, 64, 77, 40, (4, 40)), torch.float16, "cuda")
    out = grca_triton(*arguments)
    q, text_kv, text_row, ref_kv, ref_row, ref_length = arguments
    if control == "joint softmax":
        wrong = _joint(*arguments)
    elif control == "text rows swapped":
        wrong = reference((q, text_kv, text_row.roll(1), ref_kv, ref_row, ref_length))
    else:
        halved = ref_kv.clone()
        halved[:, 1] *= 0.5
        wrong = reference((q, text_kv, text_row, halved, ref_row, ref_length))
    assert error(out, wrong) > 10 * TOLERANCE[torch.float16]


def _joint(q, text_kv, text_row, ref_kv, ref_row, ref_length) -> torch.Tensor:
    split = functools.partial(torch.unflatten, dim=-1, sizes=q.shape[2:])
    outs = []
    for row in range(q.shape[0]):
        refs = ref_kv[ref_row[row].long(), :, : int(ref_length[ref_row[row].long()])]
        keys, values = split(torch.cat([text_kv[text_row[row].long()], refs], 1).float())
        weights = (torch.einsum("shd,khd->hsk", q[row].float(), keys) / q.shape[-1] ** 0.5).softmax(-1)
        outs.append(torch.einsum("hsk,khd->shd", weights, values))
    return torch.stack(outs)


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (1, lambda tensor: tensor.cpu(), "text_kv"),
        (3, lambda tensor: tensor.float(), "ref_kv"),
        (4, lambda tensor: tensor.long(), "ref_row"),
        (5, lambda tensor: tensor[:1], "ref_length"),
        (0, lambda tensor: tensor.transpose(2, 3), "q"),
    ],
)
def test_bad_arguments_are_named(index: int, change, name: str) -> None:
    arguments = list(inputs(Case(4, 64, 2, 64, 77, 40, (4, 40)), torch.float16, "cuda"))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=f"grca_triton: {name} is "):
        grca_triton(*arguments)
