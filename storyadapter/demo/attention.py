"""Reference cross-attention of a whole UNet for training: any number of references per row, its own λ per row."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from storyadapter.demo.networks import Adapter


class ReferenceAttention:
    """out = attention to the text + λ · attention to the references; plain attention without `pair`.

    Source: IP-Adapter (arXiv 2308.06721), equation 5, with λ as in Story-Adapter (arXiv 2410.06244).
    """

    def __init__(self, pair: nn.ModuleDict | None = None) -> None:
        self._pair = pair

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        references: Tensor | None = None,
        reference_mask: Tensor | None = None,
        reference_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer that holds the text's projections.
            hidden_states: [B, S, C].
            encoder_hidden_states: text [B, T, cross width]; None: self-attention.
            attention_mask: unused by SDXL.
            temb: unused by SDXL.
            references: tokens [B, R, cross width].
            reference_mask: [B, 1, 1, R], true where a token counts; at least one per row.
            reference_scale: λ, [B, 1, 1].

        Returns:
            [B, S, C].
        """
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _heads(attn, attn.to_q(hidden_states))
        out = scaled_dot_product_attention(query, _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text)))
        out = out.transpose(1, 2).flatten(2)
        if self._pair is not None and references is not None:
            key, value = self._pair["to_k_ip"](references), self._pair["to_v_ip"](references)
            seen = scaled_dot_product_attention(query, _heads(attn, key), _heads(attn, value), reference_mask)
            out = out + reference_scale.to(out.dtype) * seen.transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def attach(unet: UNet2DConditionModel, adapter: Adapter) -> None:
    """Give a UNet the adapter: its call then takes `references`, `reference_mask`, `reference_scale` as
    `cross_attention_kwargs`."""
    pairs = dict(adapter.ip_adapter.items())
    unet.set_attn_processor(
        {name: ReferenceAttention(pairs.get(str(i))) for i, name in enumerate(unet.attn_processors)}
    )
