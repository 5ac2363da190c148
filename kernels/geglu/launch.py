"""`storyadapter::geglu_triton`: the GEGLU layer's product and activation as one operator.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` and AOTInductor (`torch.library.triton_op`), and can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch.library import triton_op, wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor

from storyadapter.kernels.geglu.kernel import RUN, geglu_kernel
from storyadapter.kernels.launching import Checks, capability, processors
from storyadapter.kernels.tiles import GEGLU, GegluTiles

# K and N are multiples of this: rows start at 16 bytes, and runs of value and gate rows are whole.
WIDTH_UNIT = 16
_RUN = int(RUN.value)
_CHECKS = Checks("geglu_triton")


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


def geglu_keywords(x: Tensor, weight: Tensor, tiles: GegluTiles) -> dict[str, Any]:
    """Compile-time arguments and options of `geglu_kernel`; int() fixes what a compiler may have made symbolic."""
    return {"K": int(x.shape[1]), "N": int(weight.shape[0]) // 2, **tiles.constants(), **tiles.options()}


def launch_geglu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, tiles: GegluTiles, programs: int) -> None:
    """Computes into `out` [M, N] with arguments as those of `geglu_triton`, already checked.

    `programs`: of a persistent kernel.
    """
    rows, keywords = x.shape[0], geglu_keywords(x, weight, tiles)
    blocks = (rows + tiles.block_m - 1) // tiles.block_m * -(-2 * keywords["N"] // tiles.block_n)
    grid = (programs if tiles.persistent else blocks, 1, 1)
    if not tiles.descriptors:
        wrap_triton(geglu_kernel)[grid](out, x, weight, bias, rows, **keywords)
        return
    blocks_of: dict[str, list[int | torch.SymInt]] = {
        "x": [tiles.block_m, tiles.block_k],
        "weight": [tiles.block_n, tiles.block_k],
    }
    if wrap_triton(geglu_kernel) is geglu_kernel:
        x_blocks = TensorDescriptor.from_tensor(x, blocks_of["x"])
        weight_blocks = TensorDescriptor.from_tensor(weight, blocks_of["weight"])
        geglu_kernel[grid](out, x_blocks, weight_blocks, bias, rows, **keywords)
        return
    # Outside of Dynamo, wrap_triton records no descriptors (torch 2.11 to 2.13); this is the node that Dynamo records:
    # tensors instead of descriptors, the blocks beside them, and the options as those of a single configuration.
    single = triton.autotune([triton.Config({}, **tiles.options())], key=[])(geglu_kernel)
    triton_kernel_wrapper_mutation(
        kernel_idx=wrap_triton(single).kernel_idx,
        constant_args_idx=kernel_side_table.add_constant_args({}),
        grid=[grid],
        tma_descriptor_metadata={name: create_tma_stable_metadata(block) for name, block in blocks_of.items()},
        kwargs={
            **{"out": out, "x": x, "weight": weight, "bias": bias, "rows": rows},
            **{name: value for name, value in keywords.items() if name not in tiles.options()},
        },
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
