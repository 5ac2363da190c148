"""A residual addition and the layer normalization of its result in one pass over memory.

    sum = x + residual, rounded to the dtype;   normed = (sum - mean) / √(variance + ε) · weight + bias, in fp32

Source of the normalization: Ba, Kiros and Hinton, arXiv 1607.06450. A program takes ROWS rows. Channels are read as two
blocks of powers of two (1280 = 1024 + 256), so that few lanes idle; both stay in registers, and the variance is taken
from the differences from the mean.
"""

import triton
import triton.language as tl


@triton.jit
def _load_sum(x, residual, offsets, inside):
    """The rounded sum of one block, and the same in fp32; zero where not `inside`."""
    left = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    total = (left + right).to(x.dtype.element_ty)
    return total, total.to(tl.float32)


@triton.jit
def _store_normed(normed, weight, bias, channels, channel_inside, offsets, inside, scaled):
    """`scaled`: differences from the mean over the deviation, [ROWS, block]."""
    factor = tl.load(weight + channels, mask=channel_inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=channel_inside, other=0.0).to(tl.float32)
    result = scaled * factor[None, :] + shift[None, :]
    tl.store(normed + offsets, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def add_layer_norm_kernel(
    total, normed, x, residual, weight, bias, rows,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total and normed [rows, CHANNELS] from x and residual [rows, CHANNELS], weight and bias [CHANNELS].

    BLOCK + REST cover the channels; REST is 0 where BLOCK alone does.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = (row < rows)[:, None]
    base = row.to(tl.int64)[:, None] * CHANNELS

    channels = tl.arange(0, BLOCK)
    channel_inside = channels < CHANNELS
    offsets = base + channels[None, :]
    inside = row_inside & channel_inside[None, :]
    sums, wide = _load_sum(x, residual, offsets, inside)
    mean = tl.sum(wide, 1)
    if REST > 0:
        rest_channels = BLOCK + tl.arange(0, REST)
        rest_channel_inside = rest_channels < CHANNELS
        rest_offsets = base + rest_channels[None, :]
        rest_inside = row_inside & rest_channel_inside[None, :]
        rest_sums, rest_wide = _load_sum(x, residual, rest_offsets, rest_inside)
        mean += tl.sum(rest_wide, 1)
    mean = mean / CHANNELS

    wide = tl.where(channel_inside[None, :], wide - mean[:, None], 0.0)
    variance = tl.sum(wide * wide, 1)
    if REST > 0:
        rest_wide = tl.where(rest_channel_inside[None, :], rest_wide - mean[:, None], 0.0)
        variance += tl.sum(rest_wide * rest_wide, 1)
    scale = (1.0 / tl.sqrt_rn(variance / CHANNELS + EPS))[:, None]

    tl.store(total + offsets, sums, mask=inside)
    _store_normed(normed, weight, bias, channels, channel_inside, offsets, inside, wide * scale)
    if REST > 0:
        tl.store(total + rest_offsets, rest_sums, mask=rest_inside)
        _store_normed(
            normed, weight, bias, rest_channels, rest_channel_inside, rest_offsets, rest_inside, rest_wide * scale
        )
