"""The kernel benchmark without a GPU: cases, baselines, report, and what it refuses."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storyadapter.bench.kernels.command import add_arguments, run
from storyadapter.method.errors import InputError, UnavailableError
from tests.kernels.interpreter_process import run_interpreted

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import argparse, sys
from storyadapter.bench.kernels.command import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
assert not {"torch", "triton"} & set(sys.modules), "options must not import what they run"
sys.exit(run(parser.parse_args()))
"""


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


CONTENDERS = {
    "grca": {"grca_triton", "published (materialized scores)"},
    "geglu": {"geglu_triton", "F.linear alone"},
    "layer_norm": {"add_layer_norm_triton", "eager add + layer_norm"},
    "convolution_fp8": {"convolution_fp8_triton", "F.conv2d + residual in half precision"},
    "linear_fp8": {"linear_fp8_triton", "F.linear in half precision"},
    "group_norm": {"group_norm_triton", "eager group_norm + silu"},
}


def test_smoke_run_writes_a_report(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    printed = run_interpreted("-c", PROGRAM, "--device", "cpu", "--smoke", "--out", str(tmp_path / "kernel"))
    text = (tmp_path / "kernel.md").read_text(encoding="utf-8")
    assert printed.strip() == text.strip()
    data = json.loads((tmp_path / "kernel.json").read_text(encoding="utf-8"))
    assert {"device", "torch", "triton", "commit", "command"} <= set(data["environment"])
    assert [result["kernel"] for result in data["results"]] == ["grca", *CONTENDERS]
    for result in data["results"]:
        assert set(result["contenders"]) == CONTENDERS[result["kernel"]]
        for contender in result["contenders"].values():
            assert len(contender["raw_ms"]) >= 30 and contender["error"] < 5e-3
    assert text.count("| smoke |") == 4
    assert "| case | B | N | ms | ± ms | error | TFLOP/s | MB moved | roofline | limit | fastest baseline |" in text
    assert "| M | C | ms | ± ms | error | TFLOP/s | MB moved | roofline | limit | fastest baseline |" in text


def test_one_kernel_alone() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    printed = run_interpreted("-c", PROGRAM, "--device", "cpu", "--smoke", "--kernel", "layer_norm")
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "# The kernels in float16: layer_norm",
        "## layer_norm",
    ]


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (("--repeats", "5"), InputError, "expected at least 30"),
        (("--device", "cpu"), InputError, "expected --smoke"),
        (("--device", "cpu", "--smoke", "--dtype", "bfloat16"), InputError, "expected float16, or a GPU"),
        (("--device", "quantum"), InputError, "expected cuda, cuda:<index> or cpu"),
    ],
)
def test_refusals(words: tuple[str, ...], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        run(_options(*words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_told() -> None:
    with pytest.raises(UnavailableError, match="no CUDA device here"):
        run(_options())


def test_costs_of_a_case_by_hand() -> None:
    from storyadapter.bench.kernels.cases import GegluCase, GrcaCase, LayerNormCase, LayerShape

    case = GrcaCase(LayerShape("hand", 10, 2, 32), 4, 3)  # 2 rows of 77 + 4 keys, 2 of 77 + 12
    assert case.exponentials == 10 * 2 * (2 * 81 + 2 * 89)
    assert case.operations == 4 * 32 * case.exponentials
    assert case.bytes_moved(2) == 2 * (2 * 4 * 10 * 64 + 2 * 64 * (3 * 77 + 4 + 12))
    long = replace(case, chunks=3)
    assert long.exponentials == 10 * 2 * (2 * (231 + 4) + 2 * (231 + 12))
    assert long.bytes_moved(2) == 2 * (2 * 4 * 10 * 64 + 2 * 64 * (3 * 231 + 4 + 12))
    assert case.cells == ["hand", "4", "3"] and long.cells == ["hand, 3 chunks", "4", "3"]
    geglu = GegluCase(M=3, K=5, N=7)
    assert geglu.operations == 2 * 3 * 5 * 14
    assert geglu.bytes_moved(2) == 2 * (3 * 5 + 14 * 5 + 14 + 3 * 7)
    assert LayerNormCase(M=3, C=5).bytes_moved(2) == 2 * 4 * 15


def test_baselines_get_the_same_function() -> None:
    from storyadapter.bench.kernels.cases import SMOKE_CASES, GrcaCase, LayerShape

    for case in (*SMOKE_CASES, GrcaCase(LayerShape("long", 32, 1, 32), 4, 3, chunks=3)):
        inputs = case.inputs(torch.float32, torch.device("cpu"), 0)
        for baseline in case.baselines():
            if not baseline.cuda_only:
                expected = (baseline.expected or case.expected)(*inputs)
                torch.testing.assert_close(baseline.run(*case.baseline_inputs(*inputs)), expected)


def test_only_the_geglu_has_a_baseline_that_is_a_part() -> None:
    from storyadapter.bench.kernels.cases import SMOKE_CASES

    parts = [item.name for case in SMOKE_CASES for item in case.baselines() if item.expected is not None]
    assert parts == ["F.linear alone"]


def test_every_case_has_the_whole_recompile_limit_for_flex_attention() -> None:
    """Each case asks for baselines anew, which forgets the shapes of earlier cases; else FlexAttention is refused."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    from storyadapter.bench.kernels.baselines import grca_baselines

    def attend(tokens: int) -> None:
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
        kv = torch.randn(1, 1, tokens, 16)
        with torch.no_grad():
            compiled(torch.randn(1, 1, 16, 16), kv, kv)

    with torch._dynamo.config.patch(recompile_limit=2):
        for case in range(3):
            grca_baselines()
            attend(16 + case)
        grca_baselines()
        with pytest.raises(FailOnRecompileLimitHit):
            for case in range(3):
                attend(16 + case)
    torch.compiler.reset()


def test_the_table_covers_what_it_promises() -> None:
    from storyadapter.bench.kernels.cases import ALL_CASES, LAYERS_1024, GegluCase, GrcaCase, LayerNormCase

    cases = [case for case in ALL_CASES if isinstance(case, GrcaCase)]
    assert {case.rows for case in cases} == {2, 8, 16, 32}
    assert {case.frames for case in cases} == {1, 8, 16, 50, 100}
    assert {(case.layer.query_tokens, case.layer.heads) for case in cases} >= {(4096, 10), (1024, 20), (576, 20)}
    assert len(set(cases)) == len(cases) == 50 and sum(case.chunks == 3 for case in cases) == 2
    layers = {(16 * layer.query_tokens, layer.heads * layer.head_size) for layer in LAYERS_1024}
    assert {(case.M, case.K) for case in ALL_CASES if isinstance(case, GegluCase)} == layers
    assert {(case.M, case.C) for case in ALL_CASES if isinstance(case, LayerNormCase)} == layers
    assert all(case.N == 4 * case.K for case in ALL_CASES if isinstance(case, GegluCase))


def test_a_wrong_baseline_stops_everything() -> None:
    from storyadapter.bench.kernels.baselines import Baseline
    from storyadapter.bench.kernels.cases import LayerNormCase
    from storyadapter.bench.kernels.run import WrongResult, measure_case

    case, cpu = LayerNormCase(16, 32), torch.device("cpu")
    right = case.baselines()[0].run
    forgetful = Baseline("forgets the sum", lambda x, *rest: (x, right(x, *rest)[1]))
    with pytest.raises(WrongResult):
        measure_case(case, [forgetful], cpu, torch.float16, 30)


def test_errors_of_several_tensors() -> None:
    from storyadapter.bench.kernels.run import relative_error

    one, two = torch.ones(4), torch.full((4,), 2.0)
    assert relative_error((one, two), (one, one)) == 1.0
    nan = torch.full((4,), float("nan"))
    assert not relative_error((one, nan), (one, one)) <= 1 and not relative_error((nan, one), (one, one)) <= 1
    with pytest.raises(ValueError):
        relative_error((one, two), one)


def test_the_report_sets_the_kernel_beside_the_fastest_baseline() -> None:
    from storyadapter.bench.kernels.cases import GegluCase
    from storyadapter.bench.kernels.roofline import Rates
    from storyadapter.bench.kernels.run import CaseResult, KernelReport, Measured, markdown
    from storyadapter.bench.timing import Timing

    def measured(milliseconds: float) -> Measured:
        return Measured(1e-4, Timing((milliseconds, milliseconds), 1, True))

    times = {"geglu_triton": measured(0.75), "alone": measured(0.7), "slow": measured(2.0), "to beat": measured(1.0)}
    result = CaseResult(
        GegluCase(65536, 640, 2560), {**times, "none": Measured(None, None, "no memory")}, frozenset({"alone"})
    )
    report = KernelReport({"device": "a GPU"}, torch.float16, Rates(770e12, 4e12, 3e12), [result])
    page = markdown(report).splitlines()
    row = "| 65536 | 640 | 2560 | 0.7500 | 0.0000 | 1.0e-04 | 573 | 426 | 74% | matrix | to beat | 1.0000 | 1.33× |"
    assert row in page
    assert "| 65536 | 640 | 2560 | 0.7500 | 0.7000 | 2.0000 | 1.0000 | - |" in page
    assert "- could not run: none: no memory" in page
