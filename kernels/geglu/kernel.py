"""The matrix product of a GEGLU layer with the gated activation in its epilogue.

    out = (x·W_valueᵀ + b_value) · gelu(x·W_gateᵀ + b_gate)

Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202). One product with 2·N rows of weights whose value
and gate rows alternate in runs of `RUN`: in the accumulator's layout a thread then holds both halves of every pair, two
neighbouring outputs at a time, so that the epilogue moves nothing between threads and [M, 2·N] is never written.

A program takes one tile of BLOCK_M rows and BLOCK_N columns of the product, or, if PERSISTENT, every tile whose number
leaves its own remainder; then the loads of the next tile start before the epilogue of this one. Tiles are numbered in
groups of GROUP_M blocks of rows, so that programs running at the same time share operands in the cache.
"""

import triton
import triton.language as tl

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
def _halves(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    value_bias, gate_bias = _halves(biases.to(tl.float32)[None, :], 1, BLOCK_N)
    value, gate = _halves(accumulator, BLOCK_M, BLOCK_N)
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

    The output comes first: PyTorch counts arguments to find the ones that a kernel writes, and descriptors shift what
    follows them. x and weight are pointers, or, if DESCRIPTORS, tensor descriptors of blocks [BLOCK_M, BLOCK_K] and
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
