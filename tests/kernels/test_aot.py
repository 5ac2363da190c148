"""The kernel compiled ahead of time for GPUs that are not here."""

import re
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from storyadapter.kernels.grca.aot import (  # noqa: E402
    DEFAULT_SHARED_MEMORY,
    SHARED_MEMORY_LIMIT,
    AheadOfTimeError,
    EmbeddedKernel,
    KernelArgument,
    check_resources,
    compile_kernel,
    strip_hidden_parameters,
)
from storyadapter.kernels.grca.arguments import grid_shape, packed_integers  # noqa: E402
from storyadapter.kernels.grca.kernel import RUN_TIME_INTEGERS  # noqa: E402
from storyadapter.kernels.tiles import GRCA, GRCA_EMBEDDED  # noqa: E402
from tests.kernels.assembling import assemble  # noqa: E402

TARGETS = (80, 89, 90, 100, 120)
ELF = b"\x7fELF"
# Parameter types of PTX by the kernel's types.
PTX_TYPES = {"*fp16": ".u64", "*bf16": ".u64", "*i32": ".u64", "i32": ".u32"}


def _parameters(kernel: EmbeddedKernel) -> list[str]:
    found = re.search(rf"\.entry {kernel.entry}\((.*?)\)", kernel.ptx, re.DOTALL)
    assert found is not None
    return [line.strip() for line in found.group(1).strip().splitlines()]


@pytest.mark.parametrize("capability", TARGETS)
def test_embedded_kernel_is_what_it_declares(capability: int) -> None:
    kernel = compile_kernel(capability, 10, 64, "bf16" if capability == 120 else "fp16", 77)
    assert re.search(rf"^\.target sm_{capability}a?$", kernel.ptx, re.MULTILINE)
    assert [parameter.split()[1] for parameter in _parameters(kernel)] == [
        PTX_TYPES[argument.type] for argument in kernel.arguments
    ]
    assert [argument.kind for argument in kernel.arguments] == ["input"] * 6 + ["integer"] * 11 + ["output"]
    assert re.search(rf"\.(maxntid|reqntid) {kernel.block[0]}\b", kernel.ptx)
    assert kernel.shared_bytes <= DEFAULT_SHARED_MEMORY
    assert assemble(kernel.ptx, capability).startswith(ELF)
    assert GRCA_EMBEDDED.choose(capability, 2, 64) == (kernel.tiles, capability == 90)
    assert ".loc" not in kernel.ptx and ".file" not in kernel.ptx


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_a_text_of_any_length_is_streamed_within_48_kb(capability: int) -> None:
    kernel = compile_kernel(capability, 10, 64, "fp16", None)
    assert kernel.shared_bytes <= DEFAULT_SHARED_MEMORY
    assert assemble(kernel.ptx, capability).startswith(ELF)
    # what is known when it's compiled isn't read: the code for one chunk is that of a kernel without the argument
    index = kernel.arguments.index(KernelArgument("text_tokens", "integer", "i32"))
    one_chunk = compile_kernel(capability, 10, 64, "fp16", 77)
    assert [f"[grca_kernel_param_{index}]" in ptx for ptx in (kernel.ptx, one_chunk.ptx)] == [True, False]
    if capability == 90:
        assert kernel.ptx == compile_kernel(capability, 10, 64, "fp16", 231).ptx != one_chunk.ptx


@pytest.mark.parametrize(
    ("capability", "head_size", "element_type", "heads"),
    [(89, 64, "fp16", 10), (89, 32, "fp32", 2)],
)
def test_launched_tiles_fit_shared_memory(capability: int, head_size: int, element_type: str, heads: int) -> None:
    for text_tokens in (77, 154):
        kernel = compile_kernel(capability, heads, head_size, element_type, text_tokens, embedded=False)
        assert 0 < kernel.shared_bytes <= SHARED_MEMORY_LIMIT[capability]


def test_shapes_give_the_integers_of_contiguous_tensors() -> None:
    torch = pytest.importorskip("torch")
    from storyadapter.kernels.grca.launch import launch_arguments
    from tests.kernels.grca_cases import Case, inputs

    arguments = tuple(tensor.contiguous() for tensor in inputs(Case(4, 300, 3, 64, 20, 13, (13, 4)), torch.float16))
    for table, expected in ((GRCA, (3, 5, 4)), (GRCA_EMBEDDED, (2, 3, 4))):
        tiles, _ = table.choose(90, 2, 64)
        grid, positional, keywords = launch_arguments(*arguments, torch.empty_like(arguments[0]), tiles)
        assert grid == grid_shape(4, 300, 3, tiles) == expected
        integers = [value for value in positional if isinstance(value, int)]
        packed = packed_integers(300, 13, text_tokens=20, heads=3, head_size=64)
        assert tuple(packed) == RUN_TIME_INTEGERS and list(packed.values()) == integers
        assert keywords["STRIDE_UNIT"] == 8


PTX = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1,\n\t.param .u64 f_param_2\n)\n{{{body}}}\n"


def test_hidden_parameters_that_are_read_are_refused() -> None:
    assert "f_param_1" not in strip_hidden_parameters(PTX.format(body="ld.param.b64 %rd1, [f_param_0];"), "f", 1)
    with pytest.raises(AheadOfTimeError, match="the hidden parameter f_param_2 is read"):
        strip_hidden_parameters(PTX.format(body="ld.param.b64 %rd1, [f_param_2];"), "f", 1)
    with pytest.raises(AheadOfTimeError, match="3 parameters; expected 2 and 2 hidden ones"):
        strip_hidden_parameters(PTX.format(body=""), "f", 2)


@pytest.mark.parametrize(
    ("needs", "text"),
    [
        ({"shared": 49153}, "49153 bytes of shared memory; expected at most 49152"),
        ({"shared": 0, "global_scratch_size": 128}, "global_scratch_size is 128; expected 0"),
        ({"shared": 0, "profile_scratch_size": 1}, "profile_scratch_size is 1; expected 0"),
    ],
)
def test_what_a_plain_launch_lacks_is_refused(needs: dict[str, int], text: str) -> None:
    check_resources(SimpleNamespace(shared=49152, global_scratch_size=0), DEFAULT_SHARED_MEMORY)
    with pytest.raises(AheadOfTimeError, match=text):
        check_resources(SimpleNamespace(**needs), DEFAULT_SHARED_MEMORY)


@pytest.mark.parametrize(("capability", "element_type"), [(70, "fp16"), (90, "int8")])
def test_unknown_targets_are_refused(capability: int, element_type: str) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        compile_kernel(capability, 10, 64, element_type, 77)
