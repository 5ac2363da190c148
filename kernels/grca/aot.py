"""The kernel compiled ahead of time, without a GPU, as data that a TensorRT plugin, or the CUDA driver API, can launch.

Triton appends hidden pointer parameters (global and profiling scratch) behind the kernel's own. Where their sizes are 0
nothing reads them, so they are removed and the PTX has exactly the parameters listed in `EmbeddedKernel.arguments`; a
kernel that needs scratch is refused.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from storyadapter.kernels.grca.arguments import (
    ALIGNED_STRIDE,
    ELEMENT_BYTES,
    TokenStrides,
    constants,
    grid_shape,
    packed_integers,
)
from storyadapter.kernels.grca.kernel import RUN_TIME_INTEGERS, grca_kernel
from storyadapter.kernels.tiles import GRCA, GRCA_EMBEDDED, GrcaTiles

# Shared memory that one program may use, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What a launch gets without asking for more.
DEFAULT_SHARED_MEMORY = 48 * 1024
WARP_THREADS = 32
_INDEX_INPUTS = ("text_row", "ref_row", "ref_length")
_TENSOR_INPUTS = ("q", "text_kv", "text_row", "ref_kv", "ref_row", "ref_length")
_HIDDEN_PARAMETERS = 2


class AheadOfTimeError(RuntimeError):
    """The compiled kernel can't be launched as `EmbeddedKernel` promises."""


@dataclass(frozen=True)
class KernelArgument:
    """One parameter of the entry."""

    name: str  # as in `grca_kernel`
    kind: Literal["input", "integer", "output"]  # input pointer, int32, or output pointer
    type: str  # `*fp16`, `*bf16`, `*fp32`, `*i32` or `i32`


@dataclass(frozen=True)
class EmbeddedKernel:
    """The kernel for one target, H, D and dtype, and for one T or any of them; B, S, P, G, R are free."""

    entry: str  # its name in `ptx`
    ptx: str  # text; its target is `sm_90a`, `sm_120a`, … where the architecture has such a variant
    heads: int
    head_size: int
    block: tuple[int, int, int]  # threads
    shared_bytes: int  # dynamic shared memory of a launch; over 48 KB only if asked for by attribute
    arguments: tuple[KernelArgument, ...]  # in order
    tiles: GrcaTiles  # compile-time choices

    def grid(self, rows: Any, query_tokens: Any) -> tuple[Any, Any, Any]:
        """Programs of a launch, from B and S, numbers or symbols: see `grid_shape`."""
        return grid_shape(rows, query_tokens, self.heads, self.tiles)

    def integers(self, query_tokens: Any, ref_tokens: Any, text_tokens: Any) -> dict[str, Any]:
        """The integer arguments of a launch, by name, from S, R and T, numbers or symbols: see `packed_integers`."""
        return packed_integers(query_tokens, ref_tokens, text_tokens, self.heads, self.head_size)


def compile_kernel(
    capability: int,
    heads: int,
    head_size: int,
    element_type: str,
    text_tokens: Any,
    *,
    embedded: bool = True,
    tiles: GrcaTiles | None = None,
) -> EmbeddedKernel:
    """Compiles for contiguous tensors; needs Triton, no GPU and no driver.

    Args:
        capability: target, 10·major + minor: 80, 86, 89, 90, 100 or 120.
        heads: H.
        head_size: D, 32 or 64.
        element_type: fp16 or bf16 (fp32 where not embedded).
        text_tokens: T, compiled in where `text_blocks` says so; a symbol never is.
        embedded: take the stored tiles whose shared memory is at most 48 KB.
        tiles: instead of the stored ones.

    Raises:
        ValueError: an unknown target or element type.
        AheadOfTimeError: scratch memory, an unexpected parameter list, or more shared memory than the target has.
    """
    if capability not in SHARED_MEMORY_LIMIT:
        raise ValueError(f"capability is {capability}; expected one of {sorted(SHARED_MEMORY_LIMIT)}")
    if element_type not in ELEMENT_BYTES:
        raise ValueError(f"element_type is {element_type!r}; expected one of {sorted(ELEMENT_BYTES)}")
    table = GRCA_EMBEDDED if embedded else GRCA
    chosen = tiles or table.choose(capability, ELEMENT_BYTES[element_type], head_size)[0]
    strides = TokenStrides(*[heads * head_size] * 4)
    fixed = constants(text_tokens, head_size, element_type, ALIGNED_STRIDE, strides, chosen)
    arguments = _arguments(element_type)
    types = {argument.name: argument.type for argument in arguments}
    names = grca_kernel.arg_names
    # Tensors of a plugin, as of PyTorch, start at multiples of 16 bytes; row tables need no such promise.
    wide = [index for index, name in enumerate(names) if types.get(name) == f"*{element_type}"]
    source = ASTSource(
        grca_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in {**fixed, "factor": None}.items()},
        {(index,): [["tt.divisibility", 16]] for index in wide},
    )
    options = {**chosen.options(), "enable_fp_fusion": True}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # no paths of this machine in the PTX
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_THREADS), options=options)
    entry = compiled.metadata.name
    check_resources(compiled.metadata, DEFAULT_SHARED_MEMORY if embedded else SHARED_MEMORY_LIMIT[capability])
    return EmbeddedKernel(
        entry=entry,
        ptx=strip_hidden_parameters(compiled.asm["ptx"], entry, len(arguments)),
        heads=heads,
        head_size=head_size,
        block=(WARP_THREADS * chosen.num_warps, 1, 1),
        shared_bytes=compiled.metadata.shared,
        arguments=arguments,
        tiles=chosen,
    )


def check_resources(metadata: Any, shared_limit: int) -> None:
    """Refuses a kernel that a plain launch can't give what it needs; `metadata` is Triton's of a compiled kernel.

    Raises:
        AheadOfTimeError: more shared memory than `shared_limit` bytes, or any scratch memory.
    """
    if metadata.shared > shared_limit:
        raise AheadOfTimeError(f"{metadata.shared} bytes of shared memory; expected at most {shared_limit}")
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise AheadOfTimeError(f"{scratch} is {getattr(metadata, scratch)}; expected 0")


def _arguments(element_type: str) -> tuple[KernelArgument, ...]:
    inputs = (
        KernelArgument(name, "input", "*i32" if name in _INDEX_INPUTS else f"*{element_type}")
        for name in _TENSOR_INPUTS
    )
    integers = (KernelArgument(name, "integer", "i32") for name in RUN_TIME_INTEGERS)
    return (*inputs, *integers, KernelArgument("out", "output", f"*{element_type}"))


def strip_hidden_parameters(ptx: str, entry: str, expected: int) -> str:
    """Removes the parameters that Triton appends to an entry.

    Args:
        ptx: text with one entry.
        entry: its name.
        expected: parameters that are the kernel's own.

    Raises:
        AheadOfTimeError: another number of hidden parameters than known, or one that is read.
    """
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    if found is None:
        raise AheadOfTimeError(f"no entry {entry} in the PTX")
    parameters = [line.strip().rstrip(",") for line in found.group(1).strip().splitlines()]
    if len(parameters) != expected + _HIDDEN_PARAMETERS:
        raise AheadOfTimeError(
            f"the PTX entry has {len(parameters)} parameters; expected {expected} and {_HIDDEN_PARAMETERS} hidden ones"
        )
    for parameter in parameters[expected:]:
        name = parameter.split()[-1]
        if re.search(rf"\b{re.escape(name)}\b", ptx[found.end() :]):
            raise AheadOfTimeError(f"the hidden parameter {name} is read")
    kept = ",\n".join(f"\t{parameter}" for parameter in parameters[:expected])
    return f"{ptx[: found.start(1)]}\n{kept}\n{ptx[found.end(1) :]}"
