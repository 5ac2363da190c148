"""ControlNet surgery: a ControlNet for SDXL becomes three networks of the contract.

As of the UNet, the key and value projections of its cross-attention layers run once per prompt, and what it makes of a
frame's picture once per frame; what remains runs in every call, and attends to the text alone.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from storyadapter.model.contract import control_embedding_name, control_projection_name, controlnet_name
from storyadapter.model.unet import (
    AddedEmbedding,
    ProjectedCrossAttention,
    StackedKeyValueProjection,
    TextProjection,
    encode,
    key_value_weight,
)

if TYPE_CHECKING:
    from diffusers import ControlNetModel


class TextInputs(NamedTuple):
    """What every cross-attention layer of one call reads: by width C, [L, P, 2, T, C], and [B] int32."""

    text_kv: dict[int, Tensor]
    text_row: Tensor


def text_attention(q: Tensor, text_kv: Tensor, text_row: Tensor) -> Tensor:
    """q [B, S, H, D], text_kv [P, 2, T, C], text_row [B] int32 → [B, S, H, D]."""
    shape = (q.shape[0], -1, *q.shape[2:])
    k, v = text_kv.index_select(0, text_row).unbind(1)
    queries, keys, values = (part.transpose(1, 2) for part in (q, k.view(shape), v.view(shape)))
    return nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


class TextCrossAttention(ProjectedCrossAttention):
    """One layer of a ControlNet: query projection, attention to the text, output projection."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: TextInputs, attention_mask: None = None) -> Tensor:
        """hidden_states [B, S, C] → [B, S, C]; the argument names are those by which diffusers' blocks call it."""
        inputs = encoder_hidden_states
        batch, tokens, _ = hidden_states.shape
        q = self.to_q(hidden_states).view(batch, tokens, self.heads, self.channels // self.heads)
        out = text_attention(q, inputs.text_kv[self.channels][self.layer], inputs.text_row)
        return self.to_out(out.reshape(batch, tokens, self.channels))


class ControlEmbedding(nn.Module):
    """A frame's picture → what is added to the ControlNet's first features."""

    def __init__(self, controlnet: "ControlNetModel") -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding

    def forward(self, picture: Tensor) -> Tensor:
        """picture [1, 3, 8h, 8w], 0 to 1 → condition [1, C, h, w]."""
        return self.embedding(picture)


class ControlNet(nn.Module):
    """A ControlNet without the layers that the other two networks took over (arXiv 2302.05543)."""

    def __init__(self, controlnet: "ControlNetModel", widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.time_proj = controlnet.time_proj
        self.time_embedding = controlnet.time_embedding
        self.conv_in = controlnet.conv_in
        self.down_blocks = controlnet.down_blocks
        self.mid_block = controlnet.mid_block
        self.controlnet_down_blocks = controlnet.controlnet_down_blocks
        self.controlnet_mid_block = controlnet.controlnet_mid_block

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        added_embedding: Tensor,
        condition: Tensor,
        conditioning_scale: Tensor,
        *attention: Tensor,
    ) -> tuple[Tensor, ...]:
        """Contract network `controlnet_<i>`; `attention` is `text_kv_<C>` to `text_row`, where it has such layers."""
        inputs = None
        if attention:
            inputs = TextInputs(dict(zip(self.widths, attention[:-1], strict=True)), attention[-1])
        time = self.time_proj(timestep).to(latents.dtype)
        embedding = self.time_embedding(time) + added_embedding
        sample, outputs = encode(self.down_blocks, self.conv_in(latents) + condition, embedding, inputs)
        if getattr(self.mid_block, "has_cross_attention", False):
            sample = self.mid_block(sample, embedding, encoder_hidden_states=inputs)
        else:
            sample = self.mid_block(sample, embedding)
        scale = conditioning_scale[:, None, None, None].to(latents.dtype)
        residuals = [block(output) for block, output in zip(self.controlnet_down_blocks, outputs, strict=True)]
        parts = (*residuals, self.controlnet_mid_block(sample))
        # where convolutions run channels-last, here and in the denoiser, nothing is copied between the two
        return tuple((part * scale).permute(0, 2, 3, 1).contiguous() for part in parts)


def split_controlnet(controlnet: "ControlNetModel", index: int) -> dict[str, nn.Module]:
    """Take a loaded ControlNet apart into three networks, by the contract's names.

    Its modules move into the result, so it must not be used afterwards.

    Args:
        controlnet: for SDXL, already checked by the checkpoint.
        index: which of the model's ControlNets it is.
    """
    weights: dict[int, list[Tensor]] = {}
    names = [name for name, _ in controlnet.named_modules() if name.endswith(".attn2")]
    for name in names:
        block = controlnet.get_submodule(name.removesuffix(".attn2"))
        layers = weights.setdefault(block.attn2.inner_dim, [])
        layers.append(key_value_weight(block.attn2))
        block.attn2 = TextCrossAttention(block.attn2, len(layers) - 1)
    stacked = StackedKeyValueProjection.of_layers(weights)
    projected = TextProjection(controlnet, stacked) if weights else AddedEmbedding(controlnet)
    return {
        control_embedding_name(index): ControlEmbedding(controlnet),
        control_projection_name(index): projected,
        controlnet_name(index): ControlNet(controlnet, tuple(sorted(weights))),
    }
