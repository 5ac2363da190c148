"""The fused kernel without a GPU: in Triton's interpreter, and what the launcher refuses."""

from typing import Any

import pytest
import torch

from tests.kernels.fp8_cases import E4M3, E4M3_TOLERANCE
from tests.kernels.grca_cases import TOLERANCE, Case, inputs

triton = pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from storyadapter.kernels import launching  # noqa: E402
from storyadapter.kernels.grca.aot import SHARED_MEMORY_LIMIT  # noqa: E402
from storyadapter.kernels.grca.arguments import text_blocks  # noqa: E402
from storyadapter.kernels.grca.kernel import RUN_TIME_INTEGERS, grca_kernel  # noqa: E402
from storyadapter.kernels.grca.launch import check_arguments, launch_arguments  # noqa: E402
from storyadapter.kernels.tiles import GRCA  # noqa: E402
from tests.kernels.interpreted import CASES, VARIANTS  # noqa: E402
from tests.kernels.interpreter_process import interpret  # noqa: E402
from tests.kernels.mlp_compilation import AbsentDriver, captured_graph, registers_and_stack  # noqa: E402


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computed, in one process."""
    return interpret("tests.kernels.interpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(interpreted: dict[str, Any], case: str, dtype: torch.dtype) -> None:
    assert interpreted["parity"][str(dtype)][case] < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_write_every_element_and_nothing_else(interpreted: dict[str, Any], variant: str) -> None:
    assert interpreted["variants"][variant]["error"] < TOLERANCE[torch.float32]
    assert interpreted["variants"][variant]["untouched"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_scores(interpreted: dict[str, Any], dtype: torch.dtype) -> None:
    found = interpreted["extreme"][str(dtype)]
    assert found["largest"] > 45
    assert found["error"] < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_score_that_overflows_the_fixed_shift(interpreted: dict[str, Any], dtype: torch.dtype) -> None:
    found = interpreted["late key"][str(dtype)]
    assert found["excess"] > 17  # natural units: more than fp16 weights can show over the shift
    assert found["error"] < TOLERANCE[dtype]


def test_zero_values_contribute_exactly_nothing(interpreted: dict[str, Any]) -> None:
    assert interpreted["zero values"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_in_e4m3_saturate(interpreted: dict[str, Any], dtype: torch.dtype) -> None:
    found = interpreted["e4m3"][str(dtype)]
    assert found["error"] < 4 * E4M3_TOLERANCE  # cut off instead of rounded
    assert found["saturated"]


def test_no_queries_give_an_empty_result(interpreted: dict[str, Any]) -> None:
    assert interpreted["empty"] == [2, 0, 2, 32]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text_row", "text_row is from 3 to 5; expected values from 0 to 2"),
        ("ref_row", "ref_row is from -1 to 0; expected values from 0 to 1"),
        ("ref_length", "ref_length is from 0 to 0; expected values from 1 to 10"),
        ("factor", "factor is torch.float16 [1] on cpu; expected float32 [1] with q"),
    ],
)
def test_values_on_the_host_are_checked(interpreted: dict[str, Any], name: str, text: str) -> None:
    assert interpreted["refusals"][name] == f"grca_triton: {text}"


@pytest.mark.parametrize(
    ("index", "change", "text"),
    [
        (0, lambda t: t[0], "q is of shape [8, 2, 32]; expected [B, S, H, D]"),
        (0, lambda t: t.double(), "q is torch.float64; expected float16, bfloat16 or float32"),
        (0, lambda t: t[..., :16], "q is of head size 16; expected 32 or 64"),
        (0, lambda t: t.repeat(1, 1, 1, 2)[..., ::2], "q is of stride 2 in the last dimension; expected stride 1"),
        (1, lambda t: t[:, :1], "text_kv is of shape [3, 1, 20, 64]; expected [P, 2, T, C] with C = H·D = 64"),
        (1, lambda t: t.half(), "text_kv is torch.float16; expected the dtype of q, torch.float32"),
        (1, lambda t: t[:0], "text_kv is of shape [0, 2, 20, 64]; expected [P, 2, T, C] with no empty dimension"),
        (2, lambda t: t.long(), "text_row is torch.int64; expected int32"),
        (2, lambda t: t[:3], "text_row is of shape [3]; expected [B] = [4]"),
        (3, lambda t: t[..., :32], "ref_kv is of shape [2, 2, 10, 32]; expected [G, 2, R, C] with C = H·D = 64"),
        (3, lambda t: t.to("meta"), "ref_kv is on meta; expected the device of q, cpu"),
        (4, lambda t: t.repeat(2)[::2], "ref_row is of stride 2; expected a contiguous tensor"),
        (5, lambda t: t[:1], "ref_length is of shape [1]; expected [G] = [2]"),
        (5, lambda t: t, "q is on cpu; expected a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"),
    ],
)
def test_bad_arguments_are_named(index: int, change, text: str) -> None:
    arguments = list(inputs(Case(4, 8, 2, 32, 20, 10, (4, 10)), torch.float32))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError) as raised:
        check_arguments(*arguments)
    assert str(raised.value) == f"grca_triton: {text}"


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [(1, (16, 0)), (16, (16, 0)), (20, (32, 0)), (33, (32, 16)), (77, (64, 16)), (81, (64, 32)), (128, (128, 0))],
)
def test_text_is_covered_with_little_padding(tokens: int, blocks: tuple[int, int]) -> None:
    assert text_blocks(tokens) == blocks
    assert text_blocks(129) == (0, 0)


def _specialization(case: Case, capability: int = 90, factor: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What Triton compiles one kernel for: types, constants, and what it reads off the values."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(grca_kernel.signature, grca_kernel.params, backend)
    arguments = inputs(case, torch.float16)
    out = arguments[0].clone() if factor is None else arguments[0].to(E4M3)
    _, positional, keywords = launch_arguments(*arguments, out, GRCA.choose(capability, 2, 64)[0], factor)
    _, specialization, options = bind(*positional, **keywords)
    return tuple(specialization), tuple(sorted(options.items()))


def test_one_compilation_over_batch_banks_and_reference_counts() -> None:
    found = {
        _specialization(Case(rows, tokens, 2, 64, 77, ref_tokens, (1, ref_tokens)[-banks:], prompts=prompts))
        for ref_tokens in (1, 4, 12, 16, 400)
        for rows, banks, prompts in ((1, 1, 1), (2, 1, 2), (4, 2, 3), (16, 2, 16))
        for tokens in (1, 16, 100)
    }
    assert len(found) == 1
    assert len({_specialization(Case(2, 16, heads, 64, 77, 4)) for heads in (2, 4)}) == 2  # the count can see a second


def test_one_compilation_for_one_chunk_and_one_for_all_longer_texts() -> None:
    found = [_specialization(Case(2, 16, 2, 64, 77 * chunks, 4)) for chunks in (1, 2, 3, 16)]
    assert found[0] != found[1] and len(set(found[1:])) == 1


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_results_in_e4m3_are_rounded_by_the_store(capability: int) -> None:
    found, options = _specialization(Case(2, 16, 10, 64, 77, 4), capability, torch.ones(1))
    parts = [*zip(range(len(found)), grca_kernel.arg_names, found, strict=True)]
    source = ASTSource(
        grca_kernel,
        {name: kind for _, name, (kind, _) in parts},
        {(index,): value for index, _, (kind, value) in parts if kind == "constexpr"},
        {(index,): [["tt.divisibility", 16]] for index, _, (kind, value) in parts if value == "D"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    assert "cvt.rn.satfinite.e4m3x2" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability] and registers_and_stack(compiled)[1] == 0


@pytest.mark.parametrize("free", [False, True])
def test_a_compiler_sees_one_launch_with_the_text_compiled_in_or_free(
    free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "interpreted", lambda _: True)  # lets a fake CPU tensor stand for a CUDA one
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDriver())
    arguments = inputs(Case(4, 16, 2, 64, 77, 8, (4, 8)), torch.float16)
    if free:
        arguments += (torch.ones(1),)
    else:
        torch._dynamo.mark_static(arguments[1], 2)
    graph = captured_graph(torch.ops.storyadapter.grca_triton, arguments)
    (node,) = (node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target))
    given = node.kwargs["kwargs"]
    assert node.kwargs["tensors_to_clone"] == ["out"]
    assert given["out"].meta["val"].dtype == (E4M3 if free else torch.float16)
    if free:
        text = given["text_kv"].meta["val"].shape[2]
        assert isinstance(text, torch.SymInt) and given["text_tokens"].meta["val"].node.expr == text.node.expr
        assert given["TEXT_TOKENS"] == given["TEXT_BLOCK"] == given["TEXT_REST"] == 0
    else:
        assert [given[name] for name in ("text_tokens", "TEXT_TOKENS", "TEXT_BLOCK", "TEXT_REST")] == [77, 77, 64, 16]


def test_run_time_integers_are_the_ones_of_the_kernel() -> None:
    assert set(RUN_TIME_INTEGERS) <= set(grca_kernel.arg_names)
