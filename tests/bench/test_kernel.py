"""The kernel benchmark without a GPU: cases, rivals, report, and what it refuses."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from storyadapter.bench.kernel import add_arguments, run
from storyadapter.method.errors import InputError, UnavailableError
from storyadapter.model.grca import grca
from tests.kernels.interpreter_process import run_interpreted

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import argparse, sys
from storyadapter.bench.kernel import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
assert not {"torch", "triton"} & set(sys.modules), "options must not import what they run"
sys.exit(run(parser.parse_args()))
"""


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_smoke_run_writes_a_report(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    printed = run_interpreted("-c", PROGRAM, "--device", "cpu", "--smoke", "--out", str(tmp_path / "kernel"))
    text = (tmp_path / "kernel.md").read_text(encoding="utf-8")
    assert printed.strip() == text.strip()
    data = json.loads((tmp_path / "kernel.json").read_text(encoding="utf-8"))
    assert {"device", "torch", "triton", "commit", "command"} <= set(data["environment"])
    assert len(data["results"]) == 2
    for result in data["results"]:
        assert set(result["contenders"]) == {"grca_triton", "published (materialized scores)"}
        for contender in result["contenders"].values():
            assert len(contender["raw_ms"]) >= 30 and contender["error"] < 5e-3
    assert text.count("| smoke |") == 4


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
    from storyadapter.bench.kernel_cases import KernelCase, LayerShape

    case = KernelCase(LayerShape("hand", 10, 2, 32), 4, 3)  # 2 rows of 77 + 4 keys, 2 of 77 + 12
    assert case.scores == 10 * 2 * (2 * 81 + 2 * 89)
    assert case.operations == 4 * 32 * case.scores
    assert case.bytes_moved(2) == 2 * (2 * 4 * 10 * 64 + 2 * 64 * (3 * 77 + 4 + 12))


def test_rivals_get_the_same_function() -> None:
    from storyadapter.bench.kernel_cases import expand, make_inputs, smoke_cases
    from storyadapter.bench.rivals import rivals

    for case in smoke_cases():
        inputs = make_inputs(case, torch.float32, torch.device("cpu"), 0)
        expected = grca(*inputs.arguments()).transpose(1, 2)
        for rival in rivals():
            if not rival.cuda_only:
                torch.testing.assert_close(rival.run(expand(case, inputs)), expected)


def test_every_case_has_the_whole_recompile_limit_for_flex_attention() -> None:
    """Each case asks for the rivals anew, which forgets the shapes of earlier cases; else FlexAttention is refused."""
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    from storyadapter.bench.rivals import rivals

    def attend(tokens: int) -> None:
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
        kv = torch.randn(1, 1, tokens, 16)
        with torch.no_grad():
            compiled(torch.randn(1, 1, 16, 16), kv, kv)

    with torch._dynamo.config.patch(recompile_limit=2):
        for case in range(3):
            rivals()
            attend(16 + case)
        rivals()
        with pytest.raises(FailOnRecompileLimitHit):
            for case in range(3):
                attend(16 + case)
    torch.compiler.reset()


def test_the_table_covers_what_it_promises() -> None:
    from storyadapter.bench.kernel_cases import all_cases

    cases = list(all_cases())
    assert {case.rows for case in cases} == {2, 8, 16, 32}
    assert {case.frames for case in cases} == {1, 8, 16, 50, 100}
    assert {(case.layer.query_tokens, case.layer.heads) for case in cases} >= {(4096, 10), (1024, 20), (576, 20)}
    assert len(set(cases)) == len(cases) == 48
