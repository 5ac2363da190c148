"""`storyadapter::add_layer_norm_triton`: a residual addition and the layer norm behind it as one operator.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from storyadapter.kernels.launching import Checks, capability
from storyadapter.kernels.layer_norm.kernel import add_layer_norm_kernel
from storyadapter.kernels.tiles import LAYER_NORM, LayerNormTiles

# C is a multiple of the first and at most the second: a row stays in the registers of a program.
CHANNEL_UNIT = 16
MAX_CHANNELS = 4096
_CHECKS = Checks("add_layer_norm_triton")


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
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """sum = x + residual, and its layer norm, in one kernel that reads each input once.

    Args:
        x: [M, C], contiguous, float16, bfloat16 or float32; C a multiple of 16 up to 4096.
        residual: [M, C], contiguous, dtype of x.
        weight: [C], contiguous, dtype of x.
        bias: [C], contiguous, dtype of x.
        eps: ε, over 0; a compile-time constant of the kernel.

    Returns:
        The sum, rounded to the dtype, and its layer norm, computed in fp32 from the rounded sum; both [M, C],
        contiguous, dtype of x.

    Raises:
        ValueError: an argument that the kernel can't read; see `check_layer_norm_arguments`.
    """
    check_layer_norm_arguments(x, residual, weight, bias, eps)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.device.type == "meta" or x.shape[0] == 0:
        return total, normed
    tiles, _ = LAYER_NORM.choose(capability(x.device), x.element_size(), int(x.shape[1]))
    launch_layer_norm(x, residual, weight, bias, eps, total, normed, tiles)
    return total, normed
