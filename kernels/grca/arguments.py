"""What `grca_kernel` is launched with, without PyTorch: compile-time arguments, grid, integers of packed tensors.

The launcher fills the run-time integers from the tensors' strides; a TensorRT plugin, whose tensors are always
contiguous, computes them from the shapes by the functions below.
"""

import math
from dataclasses import dataclass
from typing import Any

from storyadapter.kernels.tiles import GrcaTiles

# Text tokens whose scores are kept in registers all at once; more of them run through the running softmax.
MAX_TEXT_IN_REGISTERS = 128
# The least rows of a matrix operand.
SMALLEST_BLOCK = 16
# Rows that start at multiples of this many elements are read 16 bytes at a time.
ALIGNED_STRIDE = 8
# Element types by name: bytes, and the sum of weights up to which no single weight overflowed when it was rounded.
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
LARGEST_SUM = {"fp16": 65504.0, "bf16": 1e30, "fp32": 1e30}


@dataclass(frozen=True)
class TokenStrides:
    """Elements between neighbouring tokens: compile-time constants, since they follow from the layer's width."""

    q: int
    text: int
    ref: int
    out: int


def text_blocks(text_tokens: Any) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover T with little padding.

    (0, 0): the kernel takes T at run time, as it isn't a number before that, or is too large for registers.
    """
    if not isinstance(text_tokens, int) or text_tokens > MAX_TEXT_IN_REGISTERS:
        return 0, 0
    whole = max(SMALLEST_BLOCK, _next_power_of_two(text_tokens))
    if whole > SMALLEST_BLOCK:
        rest = max(SMALLEST_BLOCK, _next_power_of_two(text_tokens - whole // 2))
        if whole // 2 + rest < whole:
            return whole // 2, rest
    return whole, 0


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def constants(
    text_tokens: Any, head_size: int, element_type: str, stride_unit: int, strides: TokenStrides, tiles: GrcaTiles
) -> dict[str, Any]:
    """Every compile-time argument of `grca_kernel`; `element_type` is fp16, bf16 or fp32; T as for `text_blocks`."""
    text_block, text_rest = text_blocks(text_tokens)
    return {
        "SCALE": math.log2(math.e) / math.sqrt(head_size),
        "TEXT_TOKENS": text_tokens if text_block else 0,
        "TEXT_BLOCK": text_block,
        "TEXT_REST": text_rest,
        "HEAD_SIZE": head_size,
        "LIMIT": LARGEST_SUM[element_type],
        "STRIDE_UNIT": stride_unit,
        "Q_STRIDE": strides.q,
        "TEXT_STRIDE": strides.text,
        "REF_STRIDE": strides.ref,
        "OUT_STRIDE": strides.out,
        **tiles.constants(),
    }


def grid_shape(rows: Any, query_tokens: Any, heads: int, tiles: GrcaTiles) -> tuple[Any, Any, Any]:
    """Programs of one launch, (x, y, z); B and S may be symbols that take other numbers on their right only."""
    queries = tiles.block_m * tiles.tiles
    chunks = (query_tokens + (queries - 1)) // queries
    return (heads, chunks, rows) if tiles.heads_first else (chunks, heads, rows)


def packed_integers(query_tokens: Any, ref_tokens: Any, text_tokens: Any, heads: int, head_size: int) -> dict[str, Any]:
    """Run-time integers of `grca_kernel` in its order, for contiguous tensors; S, R and T may be symbols as above."""
    width = heads * head_size
    return {
        "query_tokens": query_tokens,
        "ref_tokens": ref_tokens,
        "q_stride_b": query_tokens * width // ALIGNED_STRIDE,
        "q_stride_h": head_size // ALIGNED_STRIDE,
        "text_stride_p": text_tokens * (2 * width) // ALIGNED_STRIDE,
        "text_stride_kv": text_tokens * width // ALIGNED_STRIDE,
        "ref_stride_g": ref_tokens * (2 * width) // ALIGNED_STRIDE,
        "ref_stride_kv": ref_tokens * width // ALIGNED_STRIDE,
        "out_stride_b": query_tokens * width // ALIGNED_STRIDE,
        "out_stride_h": head_size // ALIGNED_STRIDE,
        "text_tokens": text_tokens,
    }
