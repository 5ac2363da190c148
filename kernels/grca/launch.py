"""`storyadapter::grca_triton`: the fused kernel as an operator of the signature and meaning of `storyadapter::grca`.

Importing this module registers the operator and needs Triton. It runs under eager PyTorch, is seen through by
`torch.compile` (`torch.library.triton_op`), and can be captured in a CUDA graph: it allocates its output and launches
one kernel, nothing else.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from storyadapter.kernels.grca.arguments import ALIGNED_STRIDE, TokenStrides, constants, grid_shape
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.launching import ELEMENT_TYPES, Checks, capability
from storyadapter.kernels.tiles import GRCA, GrcaTiles

HEAD_SIZES = (32, 64)
_CHECKS = Checks("grca_triton")


def check_arguments(
    q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, ref_length: Tensor
) -> None:
    """Refuses what the kernel can't read; costs no synchronization.

    The values of `text_row`, `ref_row` and `ref_length` are checked where they lie on the host (the interpreter). On a
    GPU reading them would stall the stream: a row index out of range is undefined there, as for any gather without
    bounds checks; lengths over R are clamped to R.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or (on the host) value; names the argument.
    """
    if q.dim() != 4:
        raise _CHECKS.refusal("q", f"of shape {list(q.shape)}", "[B, S, H, D]")
    rows, _, heads, head_size = q.shape
    _CHECKS.element_type("q", q)
    if head_size not in HEAD_SIZES:
        raise _CHECKS.refusal("q", f"of head size {head_size}", " or ".join(str(size) for size in HEAD_SIZES))
    if q.stride(-1) != 1:
        raise _CHECKS.refusal("q", f"of stride {q.stride(-1)} in the last dimension", "stride 1")
    width = heads * head_size
    for name, kv, letters in (("text_kv", text_kv, "[P, 2, T, C]"), ("ref_kv", ref_kv, "[G, 2, R, C]")):
        if kv.dim() != 4 or kv.shape[1] != 2 or kv.shape[3] != width:
            raise _CHECKS.refusal(name, f"of shape {list(kv.shape)}", f"{letters} with C = H·D = {width}")
        if kv.shape[0] == 0 or kv.shape[2] == 0:
            raise _CHECKS.refusal(name, f"of shape {list(kv.shape)}", f"{letters} with no empty dimension")
        if kv.dtype != q.dtype:
            raise _CHECKS.refusal(name, kv.dtype, f"the dtype of q, {q.dtype}")
        if kv.stride(-1) != 1:
            raise _CHECKS.refusal(name, f"of stride {kv.stride(-1)} in the last dimension", "stride 1")
    for name, index, length, letters in (
        ("text_row", text_row, rows, "[B]"),
        ("ref_row", ref_row, rows, "[B]"),
        ("ref_length", ref_length, ref_kv.shape[0], "[G]"),
    ):
        if index.dtype != torch.int32:
            raise _CHECKS.refusal(name, index.dtype, "int32")
        if index.dim() != 1 or index.shape[0] != length:
            raise _CHECKS.refusal(name, f"of shape {list(index.shape)}", f"{letters} = [{length}]")
        if index.stride(0) != 1 and length > 1:
            raise _CHECKS.refusal(name, f"of stride {index.stride(0)}", "a contiguous tensor")
    others = {"text_kv": text_kv, "text_row": text_row, "ref_kv": ref_kv, "ref_row": ref_row, "ref_length": ref_length}
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise _CHECKS.refusal(name, f"on {tensor.device}", f"the device of q, {q.device}")
    _CHECKS.device("q", q, grca_kernel)
    if q.device.type != "cpu" or type(q) is not Tensor or rows == 0:
        return
    for name, values, low, high in (
        ("text_row", text_row, 0, text_kv.shape[0] - 1),
        ("ref_row", ref_row, 0, ref_kv.shape[0] - 1),
        ("ref_length", ref_length, 1, ref_kv.shape[2]),
    ):
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise _CHECKS.refusal(name, f"from {least} to {most}", f"values from {low} to {high}")


def launch_arguments(
    q: Tensor,
    text_kv: Tensor,
    text_row: Tensor,
    ref_kv: Tensor,
    ref_row: Tensor,
    ref_length: Tensor,
    out: Tensor,
    tiles: GrcaTiles,
    factor: Tensor | None = None,
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and keyword arguments with which `grca_kernel` computes into `out` [B, S, H, D].

    Arguments as those of `grca_triton`, already checked; `out` has stride 1 in its last dimension, and is e4m3 if there
    is a factor.
    """
    rows, query_tokens, heads, head_size = q.shape
    text_tokens = text_kv.shape[2]
    aligned = all(
        stride % ALIGNED_STRIDE == 0 for tensor in (q, text_kv, ref_kv, out) for stride in tensor.stride()[:-1]
    )
    unit = ALIGNED_STRIDE if aligned else 1
    outer = (
        *(q.stride(0), q.stride(2)),
        *(text_kv.stride(0), text_kv.stride(1)),
        *(ref_kv.stride(0), ref_kv.stride(1)),
        *(out.stride(0), out.stride(2)),
    )
    arguments = (
        *(q, text_kv, text_row, ref_kv, ref_row, ref_length),
        *(query_tokens, ref_kv.shape[2]),
        *(stride // unit for stride in outer),
        text_tokens,
        *(out, q if factor is None else factor),
    )
    # int() fixes what a compiler may have made symbolic: these are compile-time constants of the kernel.
    strides = TokenStrides(int(q.stride(1)), int(text_kv.stride(2)), int(ref_kv.stride(2)), int(out.stride(1)))
    keywords = constants(text_tokens, int(head_size), ELEMENT_TYPES[q.dtype], unit, strides, tiles)
    keywords |= tiles.options()
    return grid_shape(rows, query_tokens, heads, tiles), arguments, keywords


@triton_op("storyadapter::grca_triton", mutates_args={})
def grca_triton(
    q: Tensor,
    text_kv: Tensor,
    text_row: Tensor,
    ref_kv: Tensor,
    ref_row: Tensor,
    ref_length: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """Text attention plus reference attention of one layer in one kernel, [B, S, H, D], contiguous, dtype of q or e4m3.

    The arguments are those of `storyadapter.model.grca.grca`, which says what is computed and where it comes from;
    besides, D is 32 or 64, and q, text_kv and ref_kv have stride 1 in the last dimension.

    Args:
        factor: [1] fp32, one over the scale of an e4m3 result; None for a result in the dtype of q.

    Raises:
        ValueError: an argument that the kernel can't read; see `check_arguments`.
    """
    check_arguments(q, text_kv, text_row, ref_kv, ref_row, ref_length)
    _CHECKS.factor(factor, q, "q")
    out = torch.empty(q.shape, dtype=q.dtype if factor is None else torch.float8_e4m3fn, device=q.device)
    if q.numel() == 0:
        return out
    tiles, _ = GRCA.choose(capability(q.device), q.element_size(), int(q.shape[3]))
    grid, arguments, keywords = launch_arguments(q, text_kv, text_row, ref_kv, ref_row, ref_length, out, tiles, factor)
    wrap_triton(grca_kernel)[grid](*arguments, **keywords)
    return out
