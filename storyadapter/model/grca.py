"""Global Reference Cross-Attention as an operator: `storyadapter::grca`, its reference and its shape function.

    out = softmax(q·k_textᵀ/√D)·v_text + softmax(q·k_refᵀ/√D)·v_ref

Two softmaxes, one over the text keys and one over the reference keys; the reference scale λ is already folded into
v_ref. Source: Story-Adapter (arXiv 2410.06244), section 3.2, and IP-Adapter (arXiv 2308.06721), equation 5.

This implementation is plain PyTorch on every device and is the meaning of the operator; `storyadapter.kernels` offers a
fused one under another name, and a backend chooses openly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GrcaFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, kv: Tensor, row: Tensor, length: Tensor | None) -> Tensor:
    """Attention of q [B, S, H, D] over rows `row` [B] of kv [rows, 2, K, C], whose keys end at `length` [rows]."""
    batch, _, heads, head_size = q.shape
    keys = kv.shape[2]
    k, v = kv.index_select(0, row).view(batch, 2, keys, heads, head_size).unbind(1)
    mask = None
    if length is not None:
        valid = torch.arange(keys, device=kv.device) < length.index_select(0, row)[:, None]
        mask = valid[:, None, None, :]
        # a masked key has weight 0, but 0 · NaN is NaN: padding must not reach the product
        v = v.masked_fill(~valid[:, :, None, None], 0.0)
        k = k.masked_fill(~valid[:, :, None, None], 0.0)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


@torch.library.custom_op("storyadapter::grca", mutates_args=())
def grca(q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, ref_length: Tensor) -> Tensor:
    """Text attention plus reference attention of one layer; the reference implementation.

    Args:
        q: [B, S, H, D], fp32, fp16 or bf16; any strides.
        text_kv: [P, 2, T, C], keys then values of each prompt, dtype of q; C = H·D. A layer's view of the packed
            [L, P, 2, T, C].
        text_row: [B] int32, the prompt each row of q reads.
        ref_kv: [G, 2, R, C], keys then values (times λ) of each bank row, dtype of q.
        ref_row: [B] int32, the bank row each row of q reads.
        ref_length: [G] int32, ≥ 1: valid tokens of each bank row; what lies behind them is never read.

    Returns:
        [B, S, H, D], contiguous, dtype of q.
    """
    return (_attend(q, text_kv, text_row, None) + _attend(q, ref_kv, ref_row, ref_length)).contiguous()


@grca.register_fake
def _(q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, ref_length: Tensor) -> Tensor:
    return q.new_empty(q.shape)
