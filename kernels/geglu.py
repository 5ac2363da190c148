"""`storyadapter::geglu_triton`: the matrix product of a GEGLU layer with the gated activation in its epilogue.

    out = (x·W_valueᵀ + b_value) · gelu(x·W_gateᵀ + b_gate)

Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202). One product with 2·N rows of weights whose value
and gate rows alternate in runs of `RUN`: in the accumulator's layout a thread then holds both halves of every pair, two
neighbouring outputs at a time, so that the epilogue moves nothing between threads and [M, 2·N] is never written.

A program takes one tile of BLOCK_M rows and BLOCK_N columns of the product, or, if PERSISTENT, every tile whose number
leaves its own remainder; then the loads of the next tile start before the epilogue of this one. Tiles are numbered in
groups of GROUP_M blocks of rows, so that programs running at the same time share operands in the cache.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from storyadapter.kernels.launching import Checks, capability, launch, processors
from storyadapter.kernels.tiles import GEGLU, GegluTiles

# Value rows, then as many gate rows: eight columns are what a matrix instruction spreads over one row of four threads.
RUN = tl.constexpr(8)

# log2 of the normal distribution's lower tail at -a, as a polynomial in a: least-maximum fit on [0, 5.5]. The gelu made
# from it is right to 6e-6 of itself down to -5.5 and to 1e-12 below, at one exponential and no division.
TAIL_0 = tl.constexpr(-0.99999547)
TAIL_1 = tl.constexpr(-1.15124679)
TAIL_2 = tl.constexpr(-0.458480507)
TAIL_3 = tl.constexpr(-0.0539378449)
TAIL_4 = tl.constexpr(0.00849375781)
TAIL_5 = tl.constexpr(-0.000926029054)
TAIL_6 = tl.constexpr(6.09041708e-05)
TAIL_7 = tl.constexpr(-1.79345489e-06)

# K and N are multiples of this: rows start at 16 bytes, and runs of value and gate rows are whole.
WIDTH_UNIT = 16
_RUN = int(RUN.value)
_CHECKS = Checks("geglu_triton")


@triton.jit
def gelu(x):
    """x·Φ(x) in fp32, Φ the normal distribution function (the erf form); no tanh."""
    a = tl.abs(x)
    tail = TAIL_7 * a + TAIL_6
    tail = tail * a + TAIL_5
    tail = tail * a + TAIL_4
    tail = tail * a + TAIL_3
    tail = tail * a + TAIL_2
    tail = tail * a + TAIL_1
    tail = tail * a + TAIL_0
    return tl.maximum(x, 0.0) - a * tl.exp2(tail)


@triton.jit
def halves(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Value and gate columns, each [ROWS, COLUMNS / 2], of [ROWS, COLUMNS]."""
    runs = tl.reshape(product, (ROWS, COLUMNS // (2 * RUN), 2, RUN))
    value, gate = tl.split(tl.permute(runs, (0, 1, 3, 2)))
    return tl.reshape(value, (ROWS, COLUMNS // 2)), tl.reshape(gate, (ROWS, COLUMNS // 2))


@triton.jit
def _tile(
    x, weight, bias, out, rows, number, row_blocks,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    column_blocks: tl.constexpr = (2 * N + BLOCK_N - 1) // BLOCK_N
    in_group: tl.constexpr = GROUP_M * column_blocks
    group = number // in_group * GROUP_M
    group_rows = tl.minimum(row_blocks - group, GROUP_M)
    first_row = (group + number % in_group % group_rows) * BLOCK_M
    first_column = number % in_group // group_rows * BLOCK_N

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in tl.range(0, K, BLOCK_K):
            accumulator = tl.dot(x.load([first_row, k]), weight.load([first_column, k]).T, accumulator)
    else:
        # rows and columns over the edge are those at the edge once more; they are never stored
        x_rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1)
        weight_rows = first_column + tl.arange(0, BLOCK_N)
        if 2 * N % BLOCK_N != 0:
            weight_rows = tl.minimum(weight_rows, 2 * N - 1)
        depth = tl.arange(0, BLOCK_K)
        x_block = x + x_rows.to(tl.int64)[:, None] * K + depth[None, :]
        weight_block = weight + weight_rows.to(tl.int64)[:, None] * K + depth[None, :]
        for k in tl.range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                left, right = tl.load(x_block), tl.load(weight_block)
            else:
                inside = (k + depth < K)[None, :]
                left, right = tl.load(x_block, mask=inside, other=0.0), tl.load(weight_block, mask=inside, other=0.0)
            accumulator = tl.dot(left, right.T, accumulator, input_precision="ieee")
            x_block += BLOCK_K
            weight_block += BLOCK_K

    bias_columns = first_column + tl.arange(0, BLOCK_N)
    if 2 * N % BLOCK_N == 0:
        biases = tl.load(bias + bias_columns)
    else:
        biases = tl.load(bias + bias_columns, mask=bias_columns < 2 * N, other=0.0)
    value_bias, gate_bias = halves(biases.to(tl.float32)[None, :], 1, BLOCK_N)
    value, gate = halves(accumulator, BLOCK_M, BLOCK_N)
    result = (value + value_bias) * gelu(gate + gate_bias)

    out_rows = first_row + tl.arange(0, BLOCK_M)
    out_columns = first_column // 2 + tl.arange(0, BLOCK_N // 2)
    inside = (out_rows < rows)[:, None]
    if 2 * N % BLOCK_N != 0:
        inside = inside & (out_columns < N)[None, :]
    tl.store(out + out_rows.to(tl.int64)[:, None] * N + out_columns[None, :], result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("rows",))
def geglu_kernel(
    out, x, weight, bias, rows,
    K: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out [rows, N] from x [rows, K], weight [2·N, K] and bias [2·N] in runs, all contiguous.

    x and weight are pointers, or, if DESCRIPTORS, tensor descriptors of blocks [BLOCK_M, BLOCK_K] and
    [BLOCK_N, BLOCK_K].
    """
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    if PERSISTENT:
        column_blocks: tl.constexpr = (2 * N + BLOCK_N - 1) // BLOCK_N
        for number in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
            _tile(
                x, weight, bias, out, rows, number, row_blocks,
                K, N, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS,
            )  # fmt: skip
    else:
        _tile(
            x, weight, bias, out, rows, tl.program_id(0), row_blocks,
            K, N, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS,
        )  # fmt: skip


def interleave_geglu(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Lays a GEGLU projection out for `geglu_triton`.

    Args:
        weight: [2·N, K], all value rows, then all gate rows (diffusers' `GEGLU.proj`); N a multiple of 16.
        bias: [2·N], likewise.

    Returns:
        weight [2·N, K] and bias [2·N], contiguous, with 8 value rows and their 8 gate rows in turn.

    Raises:
        ValueError: another shape.
    """
    checks = Checks("interleave_geglu")
    if weight.dim() != 2 or weight.shape[0] % (2 * WIDTH_UNIT) != 0:
        expected = f"[2·N, K] with N a multiple of {WIDTH_UNIT}"
        raise checks.refusal("weight", f"of shape {list(weight.shape)}", expected)
    if bias.shape != weight.shape[:1]:
        raise checks.refusal("bias", f"of shape {list(bias.shape)}", f"[{weight.shape[0]}]")
    rows = weight.unflatten(0, (2, -1, _RUN)).transpose(0, 1).flatten(0, 2)
    return rows.contiguous(), bias.unflatten(0, (2, -1, _RUN)).transpose(0, 1).flatten().contiguous()


def check_geglu_arguments(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuses what the kernel can't read; costs no synchronization.

    Raises:
        ValueError: an argument's shape, dtype, device or layout; names the argument.
    """
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % WIDTH_UNIT != 0:
        raise _CHECKS.refusal("x", f"of shape {list(x.shape)}", f"[M, K] with K a multiple of {WIDTH_UNIT}")
    _CHECKS.element_type("x", x)
    depth = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != depth:
        raise _CHECKS.refusal("weight", f"of shape {list(weight.shape)}", f"[2·N, K] with K = {depth}")
    if weight.shape[0] == 0 or weight.shape[0] % (2 * WIDTH_UNIT) != 0:
        raise _CHECKS.refusal("weight", f"of shape {list(weight.shape)}", f"[2·N, K] with N a multiple of {WIDTH_UNIT}")
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise _CHECKS.refusal("bias", f"of shape {list(bias.shape)}", f"[2·N] = [{weight.shape[0]}]")
    _CHECKS.alike_and_contiguous(x, weight=weight, bias=bias)
    _CHECKS.device("x", x, geglu_kernel)


def geglu_constants(x: Tensor, weight: Tensor, tiles: GegluTiles) -> dict[str, Any]:
    """Compile-time arguments of `geglu_kernel`; int() fixes what a compiler may have made symbolic."""
    return {"K": int(x.shape[1]), "N": int(weight.shape[0]) // 2, **tiles.constants()}


def launch_geglu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, tiles: GegluTiles, programs: int) -> None:
    """Computes into `out` [M, N] with arguments as those of `geglu_triton`, already checked.

    `programs`: of a persistent kernel.
    """
    rows, constants = x.shape[0], geglu_constants(x, weight, tiles)
    count = (rows + tiles.block_m - 1) // tiles.block_m * -(-2 * constants["N"] // tiles.block_n)
    blocks = {"x": [tiles.block_m, tiles.block_k], "weight": [tiles.block_n, tiles.block_k]}
    launch(
        geglu_kernel,
        (programs if tiles.persistent else count, 1, 1),
        {"out": out, "x": x, "weight": weight, "bias": bias, "rows": rows},
        constants,
        tiles.options(),
        blocks if tiles.descriptors else {},
    )


@triton_op("storyadapter::geglu_triton", mutates_args={})
def geglu_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The GEGLU layer in one kernel: (x·W_valueᵀ + b_value) · gelu(x·W_gateᵀ + b_gate), gelu in its erf form.

    Products and activation in fp32, rounded once. Source: arXiv 2002.05202.

    Args:
        x: [M, K], contiguous, float16, bfloat16 or float32; K a multiple of 16.
        weight: [2·N, K] as `interleave_geglu` lays it out, contiguous, dtype of x; N a multiple of 16.
        bias: [2·N], likewise.

    Returns:
        [M, N], contiguous, dtype of x.

    Raises:
        ValueError: an argument that the kernel can't read; see `check_geglu_arguments`.
    """
    check_geglu_arguments(x, weight, bias)
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    if x.device.type == "meta" or x.shape[0] == 0:
        return out
    tiles, _ = GEGLU.choose(capability(x.device), x.element_size(), int(x.shape[1]))
    launch_geglu(x, weight, bias, out, tiles, processors(x.device))
    return out
