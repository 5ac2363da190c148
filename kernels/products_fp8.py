"""Matrix products in fp8: linear layers, 3×3 convolutions and GEGLU layers over e4m3 operands, by one kernel.

    out = scale · (x * weight) + shift [+ residual]            linear layers and convolutions, in the dtype of `shift`
    out = e4m3(factor · value · gelu(gate))                    GEGLU layers, value and gate halves of such a product

`scale` holds, for each output channel, the scale of the input times that of the channel's weights. Products are summed
in fp32 as the tensor cores do it. A convolution is an implicit product: nothing is unfolded or padded, a program reads
for each of the nine taps the tile of the channels-last picture that lies under it, and zeros where the picture ends. By
tensor descriptors (compute capability 9.0 and later) the copy engine does that; else loads are masked. A linear layer
is the convolution of one tap over a picture one row high. `storyadapter.kernels.geglu` has the order of GEGLU rows.

Importing this module registers the operators and needs Triton. They run under eager PyTorch, are seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from storyadapter.kernels.e4m3 import to_e4m3
from storyadapter.kernels.geglu import gelu, halves
from storyadapter.kernels.launching import Checks, capability, launch, processors
from storyadapter.kernels.tiles import CONVOLUTION_FP8, GEGLU_FP8, LINEAR_FP8, ProductTiles

# Channels are a multiple of this: rows start at 16 bytes.
WIDTH_UNIT: Final = 16
E4M3: Final = torch.float8_e4m3fn
_SIDE: Final = 3  # of a convolution's window


@triton.jit
def _tile(
    out, x, weight, scale, shift, residual, factor, height, width, number, row_blocks,
    C: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr,
    SHIFTS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    in_group: tl.constexpr = GROUP_M * column_blocks
    group = number // in_group * GROUP_M
    group_rows = tl.minimum(row_blocks - group, GROUP_M)
    block = group + number % in_group % group_rows
    first_column = number % in_group // group_rows * BLOCK_N

    across = (width + BLOCK_W - 1) // BLOCK_W
    down = (height + BLOCK_H - 1) // BLOCK_H
    image = block // (across * down)
    top, left = block // across % down * BLOCK_H, block % across * BLOCK_W
    pixel = tl.arange(0, BLOCK_M)
    y, z = top + pixel // BLOCK_W, left + pixel % BLOCK_W
    columns = first_column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, SIDE * SIDE * STEPS):
        tap, k = step // STEPS, step % STEPS * BLOCK_K
        tap_y, tap_x = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
        if DESCRIPTORS:
            # zeros outside of the picture, and in channels behind the last one, whatever weights stand there
            if SIDE == 1:
                under = x.load([left, k])
            else:
                under = tl.reshape(x.load([image, top + tap_y, left + tap_x, k]), (BLOCK_M, BLOCK_K))
            weights = weight.load([first_column, tap * C + k])
        else:
            rows_in, columns_in = height * STRIDE, width * STRIDE
            y_in, x_in = y * STRIDE + tap_y, z * STRIDE + tap_x
            inside = (y_in >= 0) & (y_in < rows_in) & (x_in >= 0) & (x_in < columns_in)
            start = ((image * rows_in + y_in).to(tl.int64) * columns_in + x_in) * C
            channels = k + depth
            under = tl.load(
                x + start[:, None] + channels[None, :], inside[:, None] & (channels < C)[None, :], other=0.0
            )
            place = columns.to(tl.int64) * (SIDE * SIDE * C) + tap * C
            weights = tl.load(
                weight + place[:, None] + channels[None, :], (columns < N)[:, None] & (channels < C)[None, :], other=0.0
            )
        accumulator = tl.dot(under, weights.T, accumulator)

    inside_columns = columns < N
    scales = tl.load(scale + columns, inside_columns, other=0.0)
    shifts = tl.load(shift + (image * N if SHIFTS else 0) + columns, inside_columns, other=0.0)
    result = accumulator * scales[None, :] + shifts.to(tl.float32)[None, :]
    row = (image * height + y).to(tl.int64) * width + z
    inside = ((y < height) & (z < width))[:, None]
    if GATED:
        value, gate = halves(result, BLOCK_M, BLOCK_N)
        result = value * gelu(gate) * tl.load(factor)
        columns = first_column // 2 + tl.arange(0, BLOCK_N // 2)
        place = row[:, None] * (N // 2) + columns[None, :]
        tl.store(out + place, to_e4m3(result), inside & (columns < N // 2)[None, :])
    else:
        place = row[:, None] * N + columns[None, :]
        inside = inside & inside_columns[None, :]
        if RESIDUAL:
            result += tl.load(residual + place, inside, other=0.0).to(tl.float32)
        tl.store(out + place, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("images", "height", "width"))
def product_fp8_kernel(
    out, x, weight, scale, shift, residual, factor, images, height, width,
    C: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr, STRIDE: tl.constexpr,
    SHIFTS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """out [images, height, width, N], or N / 2 if GATED, from x [images, height·STRIDE, width·STRIDE, C] e4m3,
    weight [N, SIDE·SIDE·C] e4m3, scale [N] fp32, shift [N], or [images, N] if SHIFTS, and residual as out if RESIDUAL.

    x and weight are pointers, or, if DESCRIPTORS (and STRIDE 1), tensor descriptors of blocks
    [1, BLOCK_H, BLOCK_W, BLOCK_K], or [BLOCK_W, BLOCK_K] of a matrix where SIDE is 1, and of [BLOCK_N, BLOCK_K].
    """
    row_blocks = images * ((height + BLOCK_H - 1) // BLOCK_H) * ((width + BLOCK_W - 1) // BLOCK_W)
    if PERSISTENT:
        column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        for number in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
            _tile(
                out, x, weight, scale, shift, residual, factor, height, width, number, row_blocks,
                C, N, SIDE, STRIDE, SHIFTS, RESIDUAL, GATED,
                BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS,
            )  # fmt: skip
    else:
        _tile(
            out, x, weight, scale, shift, residual, factor, height, width, tl.program_id(0), row_blocks,
            C, N, SIDE, STRIDE, SHIFTS, RESIDUAL, GATED,
            BLOCK_H, BLOCK_W, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS,
        )  # fmt: skip


def _check(
    checks: Checks, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, taps: int
) -> None:
    """Refuses what the kernel can't read; costs no synchronization. Raises ValueError, which names the argument."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype != E4M3:
            raise checks.refusal(name, tensor.dtype, "float8_e4m3fn")
    channels = x.shape[-1]
    if channels == 0 or channels % WIDTH_UNIT != 0:
        raise checks.refusal("x", f"of shape {list(x.shape)}", f"a multiple of {WIDTH_UNIT} in the last dimension")
    if weight.dim() != 2 or weight.shape[1] != taps * channels or weight.shape[0] % WIDTH_UNIT != 0:
        expected = f"[N, {taps * channels}] with N a multiple of {WIDTH_UNIT}"
        raise checks.refusal("weight", f"of shape {list(weight.shape)}", expected)
    if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
        raise checks.refusal("scale", f"{scale.dtype} of shape {list(scale.shape)}", f"float32 [{weight.shape[0]}]")
    checks.element_type("shift", shift)
    if residual is not None and residual.dtype != shift.dtype:
        raise checks.refusal("residual", residual.dtype, f"the dtype of shift, {shift.dtype}")
    others = {"weight": weight, "scale": scale, "shift": shift}
    for name, tensor in (others if residual is None else {**others, "residual": residual}).items():
        if tensor.device != x.device:
            raise checks.refusal(name, f"on {tensor.device}", f"the device of x, {x.device}")
    for name, tensor in {"x": x, **others}.items():
        if not tensor.is_contiguous():
            raise checks.refusal(name, f"of strides {list(tensor.stride())}", "a contiguous tensor")
    checks.device("x", x, product_fp8_kernel)


def launch_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    tiles: ProductTiles,
    programs: int,
    *,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    stride: int = 1,
) -> None:
    """Computes into `out` [B, h, w, N] or [M, N] (N / 2 with a factor) from arguments that are already checked.

    x: [B, h·stride, w·stride, C] or [M, C]; shift: [N] or [B, N]; `programs`: of a persistent kernel.
    """
    images, height, width = out.shape[:3] if x.dim() == 4 else (1, 1, out.shape[0])
    channels, columns = int(x.shape[-1]), int(weight.shape[0])
    down, across = ((size + block - 1) // block for size, block in ((height, tiles.block_h), (width, tiles.block_w)))
    count = images * down * across * -(-columns // tiles.block_n)
    descriptors = tiles.descriptors and stride == 1  # which know no stride
    # not of a view: AOTInductor of torch 2.11 to 2.13 writes what tells its shape in the wrong language
    pixels = [1, tiles.block_h, tiles.block_w] if x.dim() == 4 else [tiles.block_w]
    blocks = {"x": [*pixels, tiles.block_k], "weight": [tiles.block_n, tiles.block_k]} if descriptors else {}
    arguments = {
        **{"out": out, "x": x, "weight": weight, "scale": scale, "shift": shift},
        "residual": shift if residual is None else residual,
        "factor": scale if factor is None else factor,
        **{"images": images, "height": height, "width": width},
    }
    constants = {
        **{"C": channels, "N": columns, "SIDE": _SIDE if x.dim() == 4 else 1, "STRIDE": stride},
        **{"SHIFTS": shift.dim() == 2, "RESIDUAL": residual is not None, "GATED": factor is not None},
        **tiles.constants(),
        "DESCRIPTORS": descriptors,
    }
    grid = (programs if tiles.persistent else count, 1, 1)
    launch(product_fp8_kernel, grid, arguments, constants, tiles.options(), blocks)


_CONVOLUTION: Final = Checks("convolution_fp8_triton")
_LINEAR: Final = Checks("linear_fp8_triton")
_GEGLU: Final = Checks("geglu_fp8_triton")


@triton_op("storyadapter::convolution_fp8_triton", mutates_args={})
def convolution_fp8_triton(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int
) -> Tensor:
    """A 3×3 convolution with a border of zeros, one pixel wide.

    Args:
        x: [B, h, w, C] e4m3, contiguous (channels last); C a multiple of 16. With stride 2, h and w are even.
        weight: [N, 9·C] e4m3, contiguous: for each output channel the rows of its window, channels last; N a multiple
            of 16. A NaN in it can reach any output.
        scale: [N] fp32: that of x times that of each channel's weights.
        shift: [N], or [B, N] for one of each picture, contiguous, float16, bfloat16 or float32: added to the result.
        residual: [B, h / stride, w / stride, N], contiguous, dtype of shift, added as well; or None.
        stride: 1 or 2.

    Returns:
        [B, h / stride, w / stride, N], contiguous, dtype of shift, rounded once. NaN in x gives NaN under its window.

    Raises:
        ValueError: an argument that the kernel can't read; names the argument.
    """
    if x.dim() != 4:
        raise _CONVOLUTION.refusal("x", f"of shape {list(x.shape)}", "[B, h, w, C]")
    if stride not in (1, 2):
        raise _CONVOLUTION.refusal("stride", stride, "1 or 2")
    if stride == 2 and (x.shape[1] % 2 != 0 or x.shape[2] % 2 != 0):
        raise _CONVOLUTION.refusal("x", f"of shape {list(x.shape)}", "even h and w with stride 2")
    _check(_CONVOLUTION, x, weight, scale, shift, residual, _SIDE * _SIDE)
    images, height, width, columns = x.shape[0], x.shape[1] // stride, x.shape[2] // stride, weight.shape[0]
    # dimensions first: sizes of unlike shapes would be compared one by one, and B ≠ N become a rule of what is compiled
    if shift.shape != ((columns,) if shift.dim() == 1 else (images, columns)):
        raise _CONVOLUTION.refusal("shift", f"of shape {list(shift.shape)}", f"[{columns}] or [{images}, {columns}]")
    out = shift.new_empty((images, height, width, columns))
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        found = f"of shape {list(residual.shape)} and strides {list(residual.stride())}"
        raise _CONVOLUTION.refusal("residual", found, f"contiguous {list(out.shape)}")
    if x.device.type == "meta" or out.numel() == 0:
        return out
    tiles, _ = CONVOLUTION_FP8.choose(capability(x.device), 1, int(columns))
    programs = processors(x.device)
    launch_product(x, weight, scale, shift, out, tiles, programs, residual=residual, stride=stride)
    return out


@triton_op("storyadapter::linear_fp8_triton", mutates_args={})
def linear_fp8_triton(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """A linear layer.

    Args:
        x: [M, K] e4m3, contiguous; K a multiple of 16.
        weight: [N, K] e4m3, contiguous; N a multiple of 16.
        scale: [N] fp32: that of x times that of each channel's weights.
        shift: [N], contiguous, float16, bfloat16 or float32: the bias.
        residual: [M, N], contiguous, dtype of shift, added as well; or None.

    Returns:
        [M, N], contiguous, dtype of shift, rounded once. A row of x with NaN gives a row of NaN.

    Raises:
        ValueError: an argument that the kernel can't read; names the argument.
    """
    _check_matrix(_LINEAR, x, weight, scale, shift, residual)
    out = shift.new_empty((x.shape[0], weight.shape[0]))
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        found = f"of shape {list(residual.shape)} and strides {list(residual.stride())}"
        raise _LINEAR.refusal("residual", found, f"contiguous {list(out.shape)}")
    if x.device.type == "meta" or out.numel() == 0:
        return out
    tiles, _ = LINEAR_FP8.choose(capability(x.device), 1, int(x.shape[1]))
    launch_product(x, weight, scale, shift, out, tiles, processors(x.device), residual=residual)
    return out


@triton_op("storyadapter::geglu_fp8_triton", mutates_args={})
def geglu_fp8_triton(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """A GEGLU layer whose result is e4m3 as well.

    Args:
        x: [M, K] e4m3, contiguous; K a multiple of 16.
        weight: [2·N, K] e4m3 as `storyadapter.kernels.geglu.interleave_geglu` lays it out; N a multiple of 16.
        scale: [2·N] fp32, likewise: that of x times that of each channel's weights.
        shift: [2·N], likewise, float16, bfloat16 or float32: the bias.
        factor: [1] fp32: one over the scale of the result.

    Returns:
        [M, N] e4m3, contiguous: the result times `factor`; what lies beyond ±448 becomes ±448, NaN stays NaN.

    Raises:
        ValueError: an argument that the kernel can't read; names the argument.
    """
    _check_matrix(_GEGLU, x, weight, scale, shift, None)
    if weight.shape[0] % (2 * WIDTH_UNIT) != 0:
        raise _GEGLU.refusal("weight", f"of shape {list(weight.shape)}", f"[2·N, K] with N a multiple of {WIDTH_UNIT}")
    if factor.dtype != torch.float32 or factor.shape != (1,):
        raise _GEGLU.refusal("factor", f"{factor.dtype} of shape {list(factor.shape)}", "float32 [1]")
    out = x.new_empty((x.shape[0], weight.shape[0] // 2))
    if x.device.type == "meta" or out.numel() == 0:
        return out
    tiles, _ = GEGLU_FP8.choose(capability(x.device), 1, int(x.shape[1]))
    launch_product(x, weight, scale, shift, out, tiles, processors(x.device), factor=factor)
    return out


def _check_matrix(
    checks: Checks, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
) -> None:
    if x.dim() != 2:
        raise checks.refusal("x", f"of shape {list(x.shape)}", "[M, K]")
    _check(checks, x, weight, scale, shift, residual, 1)
    if shift.shape != weight.shape[:1]:
        raise checks.refusal("shift", f"of shape {list(shift.shape)}", f"[{weight.shape[0]}]")
