"""`storyadapter::group_norm_triton`: group norm, with SiLU behind it or without, of pictures that lie channels-last.

    out = act((x - mean) / √(variance + ε) · weight + bias) [· factor, rounded to e4m3], in fp32

Source of the normalization: Wu and He, arXiv 1803.08494. Three kernels: moments of each channel over a chunk of pixels;
those of each group, which become one factor and one shift per channel; the elementwise rest. Every element is read
twice and written once, in whole rows of channels. Sums of squares are taken from the differences to a chunk's first
pixel, and chunks are joined by their means (Chan, Golub and LeVeque, 1979), so that a large mean costs no digits.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from storyadapter.kernels.e4m3 import to_e4m3
from storyadapter.kernels.launching import Checks, capability, launch
from storyadapter.kernels.tiles import GROUP_NORM, GroupNormTiles

CHANNEL_UNIT: Final = 16
_CHECKS: Final = Checks("group_norm_triton")
_FINISH_ROWS: Final = 32  # chunks that the second kernel reads at a time


@triton.jit(do_not_specialize=("pixels", "chunks"))
def group_norm_moments_kernel(
    moments, x, pixels, chunks,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """moments [images, chunks, 2, CHANNELS] fp32 from x [images, pixels, CHANNELS]: of each channel over a chunk of
    ROWS · STEPS pixels the mean, and the sum of squared differences from it."""
    chunk, image = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_channels = channels < CHANNELS
    first = chunk * ROWS * STEPS
    start = x + (image.to(tl.int64) * pixels + first) * CHANNELS
    origin = tl.load(start + channels, inside_channels, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    rows = tl.arange(0, ROWS)
    for step in tl.range(STEPS):
        row = step * ROWS + rows
        inside = (first + row < pixels)[:, None] & inside_channels[None, :]
        values = tl.load(start + row[:, None] * CHANNELS + channels[None, :], inside, other=0.0).to(tl.float32)
        values = tl.where(inside, values - origin[None, :], 0.0)
        sums += values
        squares += values * values
    count = tl.minimum(pixels - first, ROWS * STEPS).to(tl.float32)
    total = tl.sum(sums, 0)
    to = moments + (image.to(tl.int64) * chunks + chunk) * (2 * CHANNELS) + channels
    tl.store(to, origin + total / count, inside_channels)
    tl.store(to + CHANNELS, tl.sum(squares, 0) - total * total / count, inside_channels)


@triton.jit(do_not_specialize=("pixels", "chunks"))
def group_norm_factors_kernel(
    factors, moments, weight, bias, pixels, chunks,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """factors [images, 2, CHANNELS] fp32, factor and shift of each channel; a group has GROUP channels of BLOCK_G."""
    group, image = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK_G)
    channels = group * GROUP + lane
    inside_channels = lane < GROUP
    rows = tl.arange(0, ROWS)
    start = moments + image.to(tl.int64) * chunks * (2 * CHANNELS)
    weighted = tl.zeros((ROWS, BLOCK_G), tl.float32)
    for first in tl.range(0, chunks, ROWS):
        chunk = first + rows
        inside = (chunk < chunks)[:, None] & inside_channels[None, :]
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        means = tl.load(start + chunk[:, None] * (2 * CHANNELS) + channels[None, :], inside, other=0.0)
        weighted += tl.where(inside, means * count[:, None], 0.0)
    elements = pixels * (GROUP * 1.0)
    mean = tl.sum(tl.sum(weighted, 1), 0) / elements
    squares = tl.zeros((ROWS, BLOCK_G), tl.float32)
    for first in tl.range(0, chunks, ROWS):
        chunk = first + rows
        inside = (chunk < chunks)[:, None] & inside_channels[None, :]
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        place = start + chunk[:, None] * (2 * CHANNELS) + channels[None, :]
        away = tl.load(place, inside, other=0.0) - mean
        own = tl.load(place + CHANNELS, inside, other=0.0)
        squares += tl.where(inside, own + count[:, None] * away * away, 0.0)
    variance = tl.sum(tl.sum(squares, 1), 0) / elements
    factor = tl.load(weight + channels, inside_channels, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + EPS)
    shift = tl.load(bias + channels, inside_channels, other=0.0).to(tl.float32) - mean * factor
    to = factors + image.to(tl.int64) * (2 * CHANNELS) + channels
    tl.store(to, factor, inside_channels)
    tl.store(to + CHANNELS, shift, inside_channels)


@triton.jit(do_not_specialize=("pixels",))
def group_norm_apply_kernel(
    out, x, factors, scale, pixels,
    CHANNELS: tl.constexpr, SILU: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [images, pixels, CHANNELS] from x, likewise, and factors [images, 2, CHANNELS]; times scale [1] if FP8."""
    image = tl.program_id(1)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_channels = channels < CHANNELS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < pixels)[:, None] & inside_channels[None, :]
    place = (image.to(tl.int64) * pixels + row)[:, None] * CHANNELS + channels[None, :]
    own = factors + image.to(tl.int64) * (2 * CHANNELS) + channels
    factor = tl.load(own, inside_channels, other=0.0)[None, :]
    shift = tl.load(own + CHANNELS, inside_channels, other=0.0)[None, :]
    result = tl.load(x + place, inside, other=0.0).to(tl.float32) * factor + shift
    if SILU:
        result = result / (1.0 + tl.exp2(result * -1.4426950408889634))
    if FP8:
        tl.store(out + place, to_e4m3(result * tl.load(scale)), inside)
    else:
        tl.store(out + place, result.to(out.dtype.element_ty), inside)


def launch_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    factor: Tensor | None,
    out: Tensor,
    tiles: GroupNormTiles,
) -> None:
    """Computes into `out`, as large as x, with arguments as those of `group_norm_triton`, already checked."""
    images, pixels, channels = x.shape[0], x.shape[1] * x.shape[2], int(x.shape[3])
    chunk = tiles.rows * tiles.steps
    chunks = (pixels + chunk - 1) // chunk
    across = -(-channels // tiles.block_c)
    moments = x.new_empty((images, chunks, 2, channels), dtype=torch.float32)
    factors = x.new_empty((images, 2, channels), dtype=torch.float32)
    constants, options = {"CHANNELS": channels}, tiles.options()
    block = {"ROWS": tiles.rows, "BLOCK_C": tiles.block_c}
    arguments = {"moments": moments, "x": x, "pixels": pixels, "chunks": chunks}
    grid = (chunks, images, across)
    launch(group_norm_moments_kernel, grid, arguments, {**constants, **block, "STEPS": tiles.steps}, options, {})
    group = channels // groups
    own = {"EPS": eps, "GROUP": group, "BLOCK_G": triton.next_power_of_2(group), "CHUNK": chunk, "ROWS": _FINISH_ROWS}
    given = {"factors": factors, "moments": moments, "weight": weight, "bias": bias}
    inputs = {**given, "pixels": pixels, "chunks": chunks}
    launch(group_norm_factors_kernel, (groups, images, 1), inputs, {**constants, **own}, {"num_warps": 4}, {})
    arguments = {"out": out, "x": x, "factors": factors, "scale": factors if factor is None else factor}
    grid = ((pixels + tiles.rows - 1) // tiles.rows, images, across)
    own = {**block, "SILU": silu, "FP8": factor is not None}
    launch(group_norm_apply_kernel, grid, {**arguments, "pixels": pixels}, {**constants, **own}, options, {})


@triton_op("storyadapter::group_norm_triton", mutates_args={})
def group_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, factor: Tensor | None, tokens: bool
) -> Tensor:
    """Group norm of each picture, with SiLU behind it or without.

    Args:
        x: [B, h, w, C], contiguous (channels last), float16, bfloat16 or float32; C a multiple of 16 and of `groups`.
        weight, bias: [C], contiguous, dtype of x.
        groups: of as many neighbouring channels each.
        eps: ε, over 0; a compile-time constant of the kernel.
        silu: whether SiLU follows.
        factor: [1] fp32, one over the scale of an e4m3 result; None for a result in the dtype of x.
        tokens: whether the result is a matrix.

    Returns:
        [B, h, w, C], or [B·h·w, C] as tokens, contiguous, computed in fp32 and rounded once. Of an e4m3 result, what
        lies beyond ±448 is ±448, and NaN stays NaN.

    Raises:
        ValueError: an argument that the kernel can't read; names the argument.
    """
    if x.dim() != 4 or x.shape[3] == 0 or x.shape[3] % CHANNEL_UNIT != 0:
        raise _CHECKS.refusal("x", f"of shape {list(x.shape)}", f"[B, h, w, C] with C a multiple of {CHANNEL_UNIT}")
    _CHECKS.element_type("x", x)
    channels = x.shape[3]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise _CHECKS.refusal(name, f"of shape {list(tensor.shape)}", f"[C] = [{channels}]")
    _CHECKS.alike_and_contiguous(x, weight=weight, bias=bias)
    if groups < 1 or channels % groups != 0:
        raise _CHECKS.refusal("groups", groups, f"a divisor of C = {channels}")
    if not eps > 0:
        raise _CHECKS.refusal("eps", eps, "a number over 0")
    _CHECKS.factor(factor, x)
    _CHECKS.device("x", x, group_norm_moments_kernel)
    shape = (x.shape[0] * x.shape[1] * x.shape[2], channels) if tokens else x.shape
    out = x.new_empty(shape, dtype=x.dtype if factor is None else torch.float8_e4m3fn)
    if x.device.type == "meta" or x.numel() == 0:
        return out
    tiles, _ = GROUP_NORM.choose(capability(x.device), x.element_size(), int(channels))
    launch_group_norm(x, weight, bias, groups, eps, silu, factor, out, tiles)
    return out
