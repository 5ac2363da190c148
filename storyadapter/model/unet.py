"""UNet surgery: an SDXL UNet and an IP-Adapter become three networks of the contract.

`TextProjection` and `ReferenceProjection` take over the key and value projections of every cross-attention layer, so
that they run once per prompt and once per iteration; `Denoiser` is the UNet that remains, whose cross-attentions take
projected keys and values. Layers of one width are packed in the order of diffusers' `unet.attn_processors`, the order
by which IP-Adapter files number them.
"""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from storyadapter.method import constants
from storyadapter.model.grca import GrcaFunction
from storyadapter.model.ip_adapter import IPAdapterWeights


class CrossAttentionInputs(NamedTuple):
    """What every cross-attention layer of one call reads; handed through diffusers' blocks as one value.

    text_kv: by width C, [L, P, 2, T, C]; text_row: [B] int32; ref_kv: by width C, [L, G, 2, R, C]; ref_row: [B] int32;
    ref_length: [G] int32.
    """

    text_kv: dict[int, Tensor]
    text_row: Tensor
    ref_kv: dict[int, Tensor]
    ref_row: Tensor
    ref_length: Tensor


class GlobalReferenceCrossAttention(nn.Module):
    """One cross-attention layer that reads projected keys and values: query projection, GRCA, output projection."""

    def __init__(self, attention: Attention, layer: int, grca: GrcaFunction) -> None:
        super().__init__()
        self.to_q = attention.to_q
        self.to_out = attention.to_out[0]
        self.heads = attention.heads
        self.channels = attention.inner_dim
        self.layer = layer
        self.grca = grca

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: CrossAttentionInputs, attention_mask: None = None
    ) -> Tensor:
        """hidden_states [B, S, C] → [B, S, C]; the argument names are those by which diffusers' blocks call it."""
        inputs = encoder_hidden_states
        batch, tokens, _ = hidden_states.shape
        q = self.to_q(hidden_states).view(batch, tokens, self.heads, self.channels // self.heads)
        out = self.grca(
            q,
            inputs.text_kv[self.channels][self.layer],
            inputs.text_row,
            inputs.ref_kv[self.channels][self.layer],
            inputs.ref_row,
            inputs.ref_length,
        )
        return self.to_out(out.reshape(batch, tokens, self.channels))


class StackedKeyValueProjection(nn.Module):
    """The key and value projections of all layers of each width, as one matrix product per width."""

    def __init__(self, weights: dict[int, Tensor]) -> None:
        """weights: by width C, [L, 2, C, W]: keys then values of each layer."""
        super().__init__()
        self.weights = nn.ParameterDict({str(channels): nn.Parameter(w, False) for channels, w in weights.items()})

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:
        """tokens [rows, K, W] → by width C, [L, rows, 2, K, C], contiguous."""
        rows, count, _ = tokens.shape
        result = {}
        for name, weight in self.weights.items():
            layers, _, channels, width = weight.shape
            projected = nn.functional.linear(tokens, weight.view(layers * 2 * channels, width))
            result[int(name)] = projected.view(rows, count, layers, 2, channels).permute(2, 0, 3, 1, 4).contiguous()
        return result


class TextProjection(nn.Module):
    """Text embeddings and sizes → the text keys and values of every layer, and what is added to the time embedding."""

    def __init__(self, unet: UNet2DConditionModel, projection: StackedKeyValueProjection) -> None:
        super().__init__()
        self.projection = projection
        self.add_time_proj = unet.add_time_proj
        self.add_embedding = unet.add_embedding

    def forward(
        self, text_embedding: Tensor, text_embedding_2: Tensor, pooled_text: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """Contract network `text_projection`; keys and values in ascending width, then `added_embedding` [P, E]."""
        kv = self.projection(torch.cat((text_embedding, text_embedding_2), dim=-1))
        # six sinusoidal embeddings in fp32, then the model's dtype before they meet the text (diffusers' SDXL order)
        size_embedding = self.add_time_proj(sizes.flatten()).view(pooled_text.shape[0], -1).to(pooled_text.dtype)
        added = self.add_embedding(torch.cat((pooled_text, size_embedding), dim=-1))
        return (*(kv[channels] for channels in sorted(kv)), added)


class ReferenceProjection(nn.Module):
    """Image embeddings → the reference keys and values of every layer, with λ folded into the values."""

    def __init__(self, adapter: IPAdapterWeights, projection: StackedKeyValueProjection) -> None:
        super().__init__()
        out_features, in_features = adapter.projection_weight.shape
        self.proj = nn.Linear(in_features, out_features, device="meta")
        self.norm = nn.LayerNorm(out_features // constants.TOKENS_PER_IMAGE, device="meta")
        weights = {
            "proj.weight": adapter.projection_weight,
            "proj.bias": adapter.projection_bias,
            "norm.weight": adapter.norm_weight,
            "norm.bias": adapter.norm_bias,
        }
        self.load_state_dict(weights, strict=True, assign=True)
        self.projection = projection

    def forward(self, image_embedding: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Contract network `reference_projection`; by ascending width, [L, 2, 4·N, C]."""
        images = image_embedding.shape[0]
        tokens = self.norm(self.proj(image_embedding).view(images, constants.TOKENS_PER_IMAGE, -1))
        kv = self.projection(tokens.view(1, images * constants.TOKENS_PER_IMAGE, -1))
        result = []
        for channels in sorted(kv):
            keys, values = kv[channels][:, 0].unbind(1)
            values = (values.float() * scale).to(values.dtype)
            result.append(torch.stack((keys, values), dim=1))
        return tuple(result)


class Denoiser(nn.Module):
    """The SDXL UNet without the layers that the two projections took over."""

    def __init__(self, unet: UNet2DConditionModel, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.conv_in = unet.conv_in
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.up_blocks = unet.up_blocks
        self.conv_norm_out = unet.conv_norm_out
        self.conv_act = unet.conv_act
        self.conv_out = unet.conv_out

    def forward(self, latents: Tensor, timestep: Tensor, added_embedding: Tensor, *others: Tensor) -> Tensor:
        """Contract network `denoiser`; `others` are its inputs from `time_condition`, in models that take one, or else
        `text_kv_<C>` to `ref_length`, in order."""
        condition, attention = None, others
        if self.time_embedding.cond_proj is not None:
            condition, *attention = others
        count = len(self.widths)
        inputs = CrossAttentionInputs(
            text_kv=dict(zip(self.widths, attention[:count], strict=True)),
            text_row=attention[count],
            ref_kv=dict(zip(self.widths, attention[count + 1 : 2 * count + 1], strict=True)),
            ref_row=attention[2 * count + 1],
            ref_length=attention[2 * count + 2],
        )
        time = self.time_proj(timestep).to(latents.dtype)
        embedding = self.time_embedding(time, condition) + added_embedding
        sample = self.conv_in(latents)
        skips = [sample]
        for block in self.down_blocks:
            if getattr(block, "has_cross_attention", False):
                sample, outputs = block(sample, embedding, encoder_hidden_states=inputs)
            else:
                sample, outputs = block(sample, embedding)
            skips.extend(outputs)
        sample = self.mid_block(sample, embedding, encoder_hidden_states=inputs)
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], tuple(skips[-count:])
            if getattr(block, "has_cross_attention", False):
                sample = block(sample, taken, embedding, encoder_hidden_states=inputs)
            else:
                sample = block(sample, taken, embedding)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


def split_unet(unet: UNet2DConditionModel, adapter: IPAdapterWeights, grca: GrcaFunction) -> dict[str, nn.Module]:
    """Take a loaded SDXL UNet apart into three networks, by the contract's names.

    The UNet's modules move into the result, so it must not be used afterwards.

    Args:
        unet: an SDXL UNet, already checked by the checkpoint.
        adapter: weights of an IP-Adapter that fits it, in the UNet's dtype.
        grca: the attention function of every cross-attention layer: `storyadapter.model.grca.grca` or its equal.
    """
    text_weights: dict[int, list[Tensor]] = {}
    ref_weights: dict[int, list[Tensor]] = {}
    for adapter_layer in adapter.layers:
        block = unet.get_submodule(adapter_layer.module.removesuffix(".attn2"))
        attention = block.attn2
        layers = text_weights.setdefault(attention.inner_dim, [])
        block.attn2 = GlobalReferenceCrossAttention(attention, len(layers), grca)
        layers.append(torch.stack((attention.to_k.weight, attention.to_v.weight)).detach())
        pair = torch.stack((adapter_layer.to_k, adapter_layer.to_v))
        ref_weights.setdefault(attention.inner_dim, []).append(pair)

    def stacked(weights: dict[int, list[Tensor]]) -> StackedKeyValueProjection:
        return StackedKeyValueProjection({channels: torch.stack(weights[channels]) for channels in sorted(weights)})

    return {
        "text_projection": TextProjection(unet, stacked(text_weights)),
        "reference_projection": ReferenceProjection(adapter, stacked(ref_weights)),
        "denoiser": Denoiser(unet, tuple(sorted(text_weights))),
    }
