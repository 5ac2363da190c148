"""`storyadapter::add_layer_norm_triton`: a residual addition and the layer norm behind it in one pass over memory.

    sum = x + residual, rounded to the dtype;   normed = (sum - mean) / √(variance + ε) · weight + bias, in fp32

Source of the normalization: Ba, Kiros and Hinton, arXiv 1607.06450. A program takes ROWS rows. Channels are read as two
blocks of powers of two (1280 = 1024 + 256), so that few lanes idle; both stay in registers, and the variance is taken
from the differences from the mean.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from storyadapter.kernels.e4m3 import to_e4m3
from storyadapter.kernels.launching import Checks, capability
from storyadapter.kernels.tiles import LAYER_NORM, LayerNormTiles

# C is a multiple of the first and at most the second: a row stays in the registers of a program.
CHANNEL_UNIT = 16
MAX_CHANNELS = 4096
_CHECKS = Checks("add_layer_norm_triton")


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
    if normed.dtype.element_ty == tl.float8e4nv:
        tl.store(normed + offsets, to_e4m3(result), mask=inside)
    else:
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


def channel_blocks(channels: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover C with little padding."""
    whole = 1 << (channels.bit_length() - 1)
    rest = channels - whole
    return (whole, 1 << (rest - 1).bit_length()) if rest else (whole, 0)


def check_layer_norm_arguments(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Refuses what the kernel can't read; costs no synchronization.

    Raises:
        ValueError: an argument's shape, dtype, device or layout, or eps; names the argument.
    """
    channels = x.shape[1] if x.dim() == 2 else 0
    if not 0 < channels <= MAX_CHANNELS or channels % CHANNEL_UNIT != 0:
        expected = f"[M, C] with C a multiple of {CHANNEL_UNIT} up to {MAX_CHANNELS}"
        raise _CHECKS.refusal("x", f"of shape {list(x.shape)}", expected)
    _CHECKS.element_type("x", x)
    if residual.dim() != 2 or residual.shape[0] != x.shape[0] or residual.shape[1] != channels:
        raise _CHECKS.refusal("residual", f"of shape {list(residual.shape)}", f"the shape of x, {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise _CHECKS.refusal(name, f"of shape {list(tensor.shape)}", f"[C] = [{channels}]")
    _CHECKS.alike_and_contiguous(x, residual=residual, weight=weight, bias=bias)
    if not eps > 0:
        raise _CHECKS.refusal("eps", eps, "a number over 0")
    _CHECKS.device("x", x, add_layer_norm_kernel)


def launch_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor,
    normed: Tensor,
    tiles: LayerNormTiles,
) -> None:
    """Computes into `total` and `normed` [M, C] with arguments as those of `add_layer_norm_triton`, already checked."""
    rows, channels = x.shape[0], int(x.shape[1])
    block, rest = channel_blocks(channels)
    wrap_triton(add_layer_norm_kernel)[((rows + tiles.rows - 1) // tiles.rows, 1, 1)](
        *(total, normed, x, residual, weight, bias, rows),
        EPS=eps,
        CHANNELS=channels,
        BLOCK=block,
        REST=rest,
        **tiles.constants(),
        **tiles.options(),
    )


@triton_op("storyadapter::add_layer_norm_triton", mutates_args={})
def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """sum = x + residual, and its layer norm, in one kernel that reads each input once.

    Args:
        x: [M, C], contiguous, float16, bfloat16 or float32; C a multiple of 16 up to 4096.
        residual: [M, C], contiguous, dtype of x.
        weight: [C], contiguous, dtype of x.
        bias: [C], contiguous, dtype of x.
        eps: ε, over 0; a compile-time constant of the kernel.
        fp8: the norm is e4m3; its scale is folded into weight and bias. What lies beyond ±448 becomes ±448, NaN stays.

    Returns:
        The sum, rounded to the dtype, and its layer norm, computed in fp32 from the rounded sum; both [M, C],
        contiguous, dtype of x, or e4m3 the norm if asked for.

    Raises:
        ValueError: an argument that the kernel can't read; see `check_layer_norm_arguments`.
    """
    check_layer_norm_arguments(x, residual, weight, bias, eps)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    if x.device.type == "meta" or x.shape[0] == 0:
        return total, normed
    tiles, _ = LAYER_NORM.choose(capability(x.device), x.element_size(), int(x.shape[1]))
    launch_layer_norm(x, residual, weight, bias, eps, total, normed, tiles)
    return total, normed
