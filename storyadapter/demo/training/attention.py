"""Reference cross-attention of a whole UNet for training: any number of references per row, its own λ per row."""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from storyadapter.demo.training.networks import Adapter


class ReferenceAttention:
    """out = attention to the text + λ · attention to the references; plain attention without `pair`.

    Source: IP-Adapter (arXiv 2308.06721), equation 5, with λ as in Story-Adapter (arXiv 2410.06244).
    """

    def __init__(self, pair: nn.ModuleDict | None = None) -> None:
        self._pair = pair

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, S, C], as is the result
        encoder_hidden_states: Tensor | None = None,  # text [B, T, cross width]; None: self-attention
        attention_mask: None = None,  # SDXL has none
        references: Tensor | None = None,  # tokens [B, R, cross width]
        reference_mask: Tensor | None = None,  # [B, 1, 1, R], true where a token counts; at least one per row
        reference_scale: Tensor | None = None,  # λ [B, 1, 1]
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = heads(attn.to_q(hidden_states))
        out = scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        if self._pair is not None and references is not None and reference_scale is not None:
            key, value = self._pair["to_k_ip"](references), self._pair["to_v_ip"](references)
            seen = scaled_dot_product_attention(query, heads(key), heads(value), reference_mask)
            out = out + reference_scale[..., None].to(out.dtype) * seen
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def attach(unet: UNet2DConditionModel, adapter: Adapter) -> None:
    """Give a UNet the adapter: its call then takes `references`, `reference_mask`, `reference_scale` as
    `cross_attention_kwargs`."""
    pairs: dict[str, Any] = dict(adapter.ip_adapter.items())
    unet.set_attn_processor(
        {name: ReferenceAttention(pairs.get(str(i))) for i, name in enumerate(unet.attn_processors)}
    )
