"""The fused GRCA kernel: text and reference attention of one layer in one pass over the queries.

For the queries q of one row b and head h (letters as in DESIGN.md)

    out = softmax(q·k_textᵀ/√D)·v_text + softmax(q·k_refᵀ/√D)·v_ref

with two separate softmaxes, both in fp32. A program takes `TILES` tiles of `BLOCK_M` queries of one row and head. The
reference tokens of a row are `full_tokens`, a multiple of BLOCK_N that needs no mask and is streamed, and a ragged end
of 1 to BLOCK_N tokens. What is the same for all tiles of a program, the text and the ragged end, is loaded before the
loop over them, so that the compiler keeps it in shared memory. A text whose tokens are known at compile time, 128 at
most, as of one chunk of a prompt, is never split: its scores fit in registers, so its weights are normalized before
their product, and text and references share one accumulator. Any other text is streamed with a running maximum; how
many tokens it has, is known at run time alone.

The streamed part is a softmax without a running maximum. Its shift is fixed beforehand: the largest score of the ragged
end plus some headroom. A softmax doesn't depend on its shift, so the result is exact unless a weight overflows; the sum
of weights shows whether one could have, and then the tile is computed again with a running maximum (Milakov and
Gimelshein, arXiv 1805.02867). Tiling: FlashAttention, arXiv 2205.14135. Exponentials are base 2 with log2(e)/√D folded
into one multiply-add.
"""

import triton
import triton.language as tl

from storyadapter.kernels.e4m3 import to_e4m3

# Rows of a remainder that is treated as one short block: the least that a matrix instruction takes.
SHORT_BLOCK = tl.constexpr(16)
# How far the fixed shift lies over the largest score of the ragged end, base 2. Later scores may exceed that one by
# 16 + HEADROOM (17 in natural units) before an fp16 weight overflows; at the other end nothing is lost that shows.
HEADROOM = tl.constexpr(8.0)

# Run-time integers that may change between calls: no value of theirs (1, multiples of 16) may start a compilation.
RUN_TIME_INTEGERS = (
    "query_tokens",
    "ref_tokens",
    "q_stride_b",
    "q_stride_h",
    "text_stride_p",
    "text_stride_kv",
    "ref_stride_g",
    "ref_stride_kv",
    "out_stride_b",
    "out_stride_h",
    "text_tokens",
)


@triton.jit
def _load_tokens(
    base, first, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """`BLOCK` rows of keys, values or queries from row `first`; rows from `count` on are zero and never read."""
    rows = first + tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * STRIDE + tl.arange(0, HEAD_SIZE)[None, :]
    if MASKED:
        return tl.load(pointers, mask=rows[:, None] < count, other=0.0)
    return tl.load(pointers)


@triton.jit
def _scores(queries, keys, first, count, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Unscaled fp32 scores [BLOCK_M, BLOCK]; keys from `count` on score -inf."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where((first + tl.arange(0, BLOCK) < count)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend(queries, keys, values, first, count, row_max, row_sum, accumulator, SCALE: tl.constexpr,
            BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One step of the running softmax over `BLOCK` keys."""
    scores = _scores(queries, keys, first, count, BLOCK, MASKED)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * correction[:, None], input_precision="ieee")
    return new_max, row_sum, accumulator


@triton.jit
def _stream(
    queries, shift, row_sum, accumulator, ref_k, ref_v, full_tokens, length,
    STRIDE: tl.constexpr, SCALE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over `ref[:full_tokens]` with a shift fixed beforehand: no maximum, no correction of what was summed."""
    for first in range(0, full_tokens, BLOCK_N):
        keys = _load_tokens(ref_k, first, length, STRIDE, BLOCK_N, HEAD_SIZE, False)
        values = _load_tokens(ref_v, first, length, STRIDE, BLOCK_N, HEAD_SIZE, False)
        scores = _scores(queries, keys, first, length, BLOCK_N, False)
        weights = tl.exp2(scores * SCALE - shift[:, None])
        row_sum += tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    return row_sum, accumulator


@triton.jit
def _stream_running(
    queries, rest_keys, rest_values, ref_k, ref_v, full_tokens, length,
    STRIDE: tl.constexpr, SCALE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Sum and weighted values of all reference tokens with a running maximum: right for any scores."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, HEAD_SIZE], tl.float32)
    row_max, row_sum, accumulator = _attend(
        queries, rest_keys, rest_values, full_tokens, length, row_max, row_sum, accumulator, SCALE, BLOCK_REST, True
    )
    for first in range(0, full_tokens, BLOCK_N):
        keys = _load_tokens(ref_k, first, length, STRIDE, BLOCK_N, HEAD_SIZE, False)
        values = _load_tokens(ref_v, first, length, STRIDE, BLOCK_N, HEAD_SIZE, False)
        row_max, row_sum, accumulator = _attend(
            queries, keys, values, first, length, row_max, row_sum, accumulator, SCALE, BLOCK_N, False
        )
    return row_sum, accumulator


@triton.jit
def _weights(scores, SCALE: tl.constexpr):
    """Softmax of one tensor of scores, fp32."""
    weights = tl.exp2(scores * SCALE - (tl.max(scores, 1) * SCALE)[:, None])
    return weights * (1.0 / tl.sum(weights, 1))[:, None]


@triton.jit
def _joint_weights(scores, more_scores, SCALE: tl.constexpr):
    """Softmax of scores that lie in two tensors, fp32."""
    shift = (tl.maximum(tl.max(scores, 1), tl.max(more_scores, 1)) * SCALE)[:, None]
    weights = tl.exp2(scores * SCALE - shift)
    more_weights = tl.exp2(more_scores * SCALE - shift)
    normalizer = (1.0 / (tl.sum(weights, 1) + tl.sum(more_weights, 1)))[:, None]
    return weights * normalizer, more_weights * normalizer


@triton.jit
def _tile(
    queries, rest_keys, rest_values, text_keys, text_values, more_keys, more_values,
    text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
    TEXT_STRIDE: tl.constexpr, REF_STRIDE: tl.constexpr, SCALE: tl.constexpr, TEXT_TOKENS: tl.constexpr,
    TEXT_BLOCK: tl.constexpr, TEXT_REST: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr, STREAM: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Result [BLOCK_M, HEAD_SIZE] in fp32 of one tile of queries."""
    rest_scores = _scores(queries, rest_keys, full_tokens, length, BLOCK_REST, True)
    if STREAM:
        shift = tl.max(rest_scores, 1) * SCALE + HEADROOM
        weights = tl.exp2(rest_scores * SCALE - shift[:, None])
        accumulator = tl.dot(weights.to(rest_values.dtype), rest_values, input_precision="ieee")
        row_sum, accumulator = _stream(
            queries, shift, tl.sum(weights, 1), accumulator, ref_k, ref_v, full_tokens, length,
            REF_STRIDE, SCALE, HEAD_SIZE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if tl.max(row_sum, 0) > LIMIT:
            row_sum, accumulator = _stream_running(
                queries, rest_keys, rest_values, ref_k, ref_v, full_tokens, length,
                REF_STRIDE, SCALE, HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_REST,
            )  # fmt: skip
        accumulator *= (1.0 / row_sum)[:, None]

    # Without a stream all products with keys come first: one wait for the matrix unit instead of two.
    if TEXT_BLOCK > 0:
        scores = _scores(queries, text_keys, 0, TEXT_TOKENS, TEXT_BLOCK, TEXT_BLOCK > TEXT_TOKENS)
    if TEXT_REST > 0:
        more_scores = _scores(queries, more_keys, TEXT_BLOCK, TEXT_TOKENS, TEXT_REST, True)
    if not STREAM:
        weights = _weights(rest_scores, SCALE).to(rest_values.dtype)
        accumulator = tl.dot(weights, rest_values, input_precision="ieee")
    if TEXT_REST > 0:
        weights, more_weights = _joint_weights(scores, more_scores, SCALE)
        accumulator = tl.dot(weights.to(text_values.dtype), text_values, accumulator, input_precision="ieee")
        accumulator = tl.dot(more_weights.to(more_values.dtype), more_values, accumulator, input_precision="ieee")
    elif TEXT_BLOCK > 0:
        weights = _weights(scores, SCALE).to(text_values.dtype)
        accumulator = tl.dot(weights, text_values, accumulator, input_precision="ieee")
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        text_part = tl.zeros([BLOCK_M, HEAD_SIZE], tl.float32)
        for first in range(0, text_tokens, BLOCK_N):
            keys = _load_tokens(text_k, first, text_tokens, TEXT_STRIDE, BLOCK_N, HEAD_SIZE, True)
            values = _load_tokens(text_v, first, text_tokens, TEXT_STRIDE, BLOCK_N, HEAD_SIZE, True)
            row_max, row_sum, text_part = _attend(
                queries, keys, values, first, text_tokens, row_max, row_sum, text_part, SCALE, BLOCK_N, True
            )
        accumulator += text_part / row_sum[:, None]
    return accumulator


@triton.jit
def _store_tile(
    out, factor, start, query_tokens, result, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    if out.dtype.element_ty == tl.float8e4nv:
        result = to_e4m3(result * tl.load(factor))
    rows = start + tl.arange(0, BLOCK_M)
    pointers = out + rows[:, None] * STRIDE + tl.arange(0, HEAD_SIZE)[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=rows[:, None] < query_tokens)


@triton.jit
def _tiles(
    q, out, factor, queries, first_query, last_query, query_tokens,
    text_keys, text_values, more_keys, more_values,
    text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
    Q_STRIDE: tl.constexpr, TEXT_STRIDE: tl.constexpr, REF_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, TEXT_TOKENS: tl.constexpr, TEXT_BLOCK: tl.constexpr, TEXT_REST: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr,
    TILES: tl.constexpr, PREFETCH: tl.constexpr, STREAM: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """All tiles of a program; `ref[full_tokens:length]`, 1 to `BLOCK_REST` tokens, stays in shared memory."""
    rest_keys = _load_tokens(ref_k, full_tokens, length, REF_STRIDE, BLOCK_REST, HEAD_SIZE, True)
    rest_values = _load_tokens(ref_v, full_tokens, length, REF_STRIDE, BLOCK_REST, HEAD_SIZE, True)
    if TILES == 1:
        result = _tile(
            queries, rest_keys, rest_values, text_keys, text_values, more_keys, more_values,
            text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
            TEXT_STRIDE, REF_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST, HEAD_SIZE, BLOCK_M, BLOCK_N,
            BLOCK_REST, STREAM, LIMIT,
        )  # fmt: skip
        _store_tile(out, factor, first_query, query_tokens, result, OUT_STRIDE, BLOCK_M, HEAD_SIZE)
    else:
        next_queries = queries
        for start in range(first_query, last_query, BLOCK_M):
            if PREFETCH:
                tile_queries = next_queries
                next_queries = _load_tokens(q, start + BLOCK_M, last_query, Q_STRIDE, BLOCK_M, HEAD_SIZE, True)
            else:
                tile_queries = _load_tokens(q, start, query_tokens, Q_STRIDE, BLOCK_M, HEAD_SIZE, True)
            result = _tile(
                tile_queries, rest_keys, rest_values, text_keys, text_values, more_keys, more_values,
                text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
                TEXT_STRIDE, REF_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST, HEAD_SIZE, BLOCK_M, BLOCK_N,
                BLOCK_REST, STREAM, LIMIT,
            )  # fmt: skip
            _store_tile(out, factor, start, query_tokens, result, OUT_STRIDE, BLOCK_M, HEAD_SIZE)


@triton.jit
def _rows(
    q, out, factor, queries, first_query, last_query, query_tokens,
    text_keys, text_values, more_keys, more_values,
    text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
    Q_STRIDE: tl.constexpr, TEXT_STRIDE: tl.constexpr, REF_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    SCALE: tl.constexpr, TEXT_TOKENS: tl.constexpr, TEXT_BLOCK: tl.constexpr, TEXT_REST: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, PREFETCH: tl.constexpr, STREAM: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    if length - full_tokens <= SHORT_BLOCK:
        _tiles(
            q, out, factor, queries, first_query, last_query, query_tokens,
            text_keys, text_values, more_keys, more_values,
            text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
            Q_STRIDE, TEXT_STRIDE, REF_STRIDE, OUT_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST,
            HEAD_SIZE, BLOCK_M, BLOCK_N, SHORT_BLOCK, TILES, PREFETCH, STREAM, LIMIT,
        )  # fmt: skip
    else:
        _tiles(
            q, out, factor, queries, first_query, last_query, query_tokens,
            text_keys, text_values, more_keys, more_values,
            text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
            Q_STRIDE, TEXT_STRIDE, REF_STRIDE, OUT_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST,
            HEAD_SIZE, BLOCK_M, BLOCK_N, BLOCK_N, TILES, PREFETCH, STREAM, LIMIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME_INTEGERS)
def grca_kernel(
    q, text_kv, text_row, ref_kv, ref_row, ref_length,
    query_tokens, ref_tokens,
    q_stride_b, q_stride_h,
    text_stride_p, text_stride_kv,
    ref_stride_g, ref_stride_kv,
    out_stride_b, out_stride_h,
    text_tokens,
    out, factor,
    SCALE: tl.constexpr, TEXT_TOKENS: tl.constexpr, TEXT_BLOCK: tl.constexpr, TEXT_REST: tl.constexpr,
    HEAD_SIZE: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    Q_STRIDE: tl.constexpr, TEXT_STRIDE: tl.constexpr, REF_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, PREFETCH: tl.constexpr,
    HEADS_FIRST: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(S / (TILES·BLOCK_M)), H, B), the first two swapped if HEADS_FIRST.

    Shapes: q, out [B, S, H, D]; text_kv [P, 2, T, H·D]; ref_kv [G, 2, R, H·D], all with stride 1 in the last dimension;
    text_row, ref_row [B] int32; ref_length [G] int32. T is text_tokens, and TEXT_TOKENS too where it is compiled in
    (else that and the blocks that cover it are 0). The strides between tokens are compile-time constants in elements
    (they depend on the layer's width alone); the others are counted in units of STRIDE_UNIT elements: a unit of 8 tells
    the compiler that rows start at multiples of 16 bytes, whatever the run-time value. If out is e4m3, the result is
    multiplied by factor [1] fp32, which is read then alone. The arguments stand in the order that a TensorRT plugin
    passes them in: inputs, integers, outputs (it has no factor).
    """
    if HEADS_FIRST:
        head = tl.program_id(0)
        chunk = tl.program_id(1)
    else:
        chunk = tl.program_id(0)
        head = tl.program_id(1)
    # The unconditional rows, first half of the batch, read few keys: run them beside the others, not before them.
    pair = tl.program_id(2)
    row = (pair % 2) * ((tl.num_programs(2) + 1) // 2) + pair // 2
    first_query = chunk * (TILES * BLOCK_M)
    last_query = tl.minimum(first_query + TILES * BLOCK_M, query_tokens)

    # Loads in the order in which their addresses are known: queries, text, references.
    q += row.to(tl.int64) * q_stride_b * STRIDE_UNIT + head * q_stride_h * STRIDE_UNIT
    out += row.to(tl.int64) * out_stride_b * STRIDE_UNIT + head * out_stride_h * STRIDE_UNIT
    prompt = tl.load(text_row + row)
    bank = tl.load(ref_row + row)
    if TILES == 1 or PREFETCH:
        queries = _load_tokens(q, first_query, query_tokens, Q_STRIDE, BLOCK_M, HEAD_SIZE, True)
    else:
        queries = 0
    column = head * HEAD_SIZE
    text_k = text_kv + prompt.to(tl.int64) * text_stride_p * STRIDE_UNIT + column
    text_v = text_k + text_stride_kv * STRIDE_UNIT
    text_keys = 0
    text_values = 0
    more_keys = 0
    more_values = 0
    if TEXT_BLOCK > 0:
        text_keys = _load_tokens(text_k, 0, TEXT_TOKENS, TEXT_STRIDE, TEXT_BLOCK, HEAD_SIZE, TEXT_BLOCK > TEXT_TOKENS)
        text_values = _load_tokens(text_v, 0, TEXT_TOKENS, TEXT_STRIDE, TEXT_BLOCK, HEAD_SIZE, TEXT_BLOCK > TEXT_TOKENS)
    if TEXT_REST > 0:
        more_keys = _load_tokens(text_k, TEXT_BLOCK, TEXT_TOKENS, TEXT_STRIDE, TEXT_REST, HEAD_SIZE, True)
        more_values = _load_tokens(text_v, TEXT_BLOCK, TEXT_TOKENS, TEXT_STRIDE, TEXT_REST, HEAD_SIZE, True)
    length = tl.minimum(tl.load(ref_length + bank), ref_tokens)
    ref_k = ref_kv + bank.to(tl.int64) * ref_stride_g * STRIDE_UNIT + column
    ref_v = ref_k + ref_stride_kv * STRIDE_UNIT

    full_tokens = (length - 1) // BLOCK_N * BLOCK_N
    if full_tokens == 0:
        _rows(
            q, out, factor, queries, first_query, last_query, query_tokens,
            text_keys, text_values, more_keys, more_values,
            text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
            Q_STRIDE, TEXT_STRIDE, REF_STRIDE, OUT_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST,
            HEAD_SIZE, BLOCK_M, BLOCK_N, TILES, PREFETCH, False, LIMIT,
        )  # fmt: skip
    else:
        _rows(
            q, out, factor, queries, first_query, last_query, query_tokens,
            text_keys, text_values, more_keys, more_values,
            text_k, text_v, text_tokens, ref_k, ref_v, full_tokens, length,
            Q_STRIDE, TEXT_STRIDE, REF_STRIDE, OUT_STRIDE, SCALE, TEXT_TOKENS, TEXT_BLOCK, TEXT_REST,
            HEAD_SIZE, BLOCK_M, BLOCK_N, TILES, PREFETCH, True, LIMIT,
        )  # fmt: skip
