"""UNet surgery: an SDXL UNet and an IP-Adapter become three networks of the contract.

`TextProjection` and `ReferenceProjection` take over the key and value projections of every cross-attention layer, so
that they run once per prompt and once per iteration; `Denoiser` is the UNet that remains, whose cross-attentions take
projected keys and values. Layers of one width are packed in the order of diffusers' `unet.attn_processors`, the order
by which IP-Adapter files number them.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from storyadapter.method import constants
from storyadapter.model.grca import GrcaFunction
from storyadapter.model.ip_adapter import IPAdapterWeights

if TYPE_CHECKING:  # to import them takes longer than all else between a command and its first step
    from diffusers import ControlNetModel, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.upsampling import Upsample2D


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


class ProjectedCrossAttention(nn.Module):
    """One cross-attention layer that reads projected keys and values; its own are the other two projections."""

    def __init__(self, attention: "Attention", layer: int) -> None:
        super().__init__()
        self.to_q = attention.to_q
        self.to_out = attention.to_out[0]
        self.heads = attention.heads
        self.channels = attention.inner_dim
        self.layer = layer


class GlobalReferenceCrossAttention(ProjectedCrossAttention):
    """One layer of the UNet: query projection, GRCA, output projection."""

    def __init__(self, attention: "Attention", layer: int, grca: GrcaFunction) -> None:
        super().__init__(attention, layer)
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

    @classmethod
    def of_layers(cls, weights: dict[int, list[Tensor]]) -> "StackedKeyValueProjection":
        """weights: by width C, of each layer [2, C, W]."""
        return cls({channels: torch.stack(weights[channels]) for channels in sorted(weights)})

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:
        """tokens [rows, K, W] → by width C, [L, rows, 2, K, C], contiguous."""
        rows, count, _ = tokens.shape
        result = {}
        for name, weight in self.weights.items():
            layers, _, channels, width = weight.shape
            projected = nn.functional.linear(tokens, weight.view(layers * 2 * channels, width))
            result[int(name)] = projected.view(rows, count, layers, 2, channels).permute(2, 0, 3, 1, 4).contiguous()
        return result


class AddedEmbedding(nn.Module):
    """Pooled text and sizes → what is added to the time embedding of a UNet or a ControlNet."""

    def __init__(self, unet: "UNet2DConditionModel | ControlNetModel") -> None:
        super().__init__()
        self.add_time_proj = unet.add_time_proj
        self.add_embedding = unet.add_embedding

    def forward(self, pooled_text: Tensor, sizes: Tensor) -> Tensor:
        """pooled_text [P, width], sizes [P, 6] fp32 → [P, E]."""
        # six sinusoidal embeddings in fp32, then the model's dtype before they meet the text (diffusers' SDXL order)
        size_embedding = self.add_time_proj(sizes.flatten()).view(pooled_text.shape[0], -1).to(pooled_text.dtype)
        return self.add_embedding(torch.cat((pooled_text, size_embedding), dim=-1))


class TextProjection(AddedEmbedding):
    """Text embeddings and sizes → the text keys and values of every layer, and what is added to the time embedding."""

    def __init__(self, unet: "UNet2DConditionModel | ControlNetModel", projection: StackedKeyValueProjection) -> None:
        super().__init__(unet)
        self.projection = projection

    def forward(  # type: ignore[override]  # the contract's inputs in order
        self, text_embedding: Tensor, text_embedding_2: Tensor, pooled_text: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """Contract network `text_projection`, and the like of a ControlNet; keys and values in ascending width, then
        `added_embedding` [P, E]."""
        kv = self.projection(torch.cat((text_embedding, text_embedding_2), dim=-1))
        return (*(kv[channels] for channels in sorted(kv)), super().forward(pooled_text, sizes))


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


def encode(blocks: nn.ModuleList, sample: Tensor, embedding: Tensor, inputs: object) -> tuple[Tensor, list[Tensor]]:
    """The encoder of a UNet or a ControlNet: its last output, and all of them, the first of which is `sample`.

    Args:
        blocks: diffusers' down blocks.
        sample: [B, C, h, w].
        embedding: [B, E].
        inputs: what their cross-attention layers read.
    """
    skips = [sample]
    for block in blocks:
        if getattr(block, "has_cross_attention", False):
            sample, outputs = block(sample, embedding, encoder_hidden_states=inputs)
        else:
            sample, outputs = block(sample, embedding)
        skips.extend(outputs)
    return sample, skips


class Upsample(nn.Module):
    """diffusers' `Upsample2D` as SDXL has it. Its special case for 64 rows and more
    (https://github.com/huggingface/diffusers/issues/984) would be a limit of what is exported."""

    def __init__(self, upsample: "Upsample2D") -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        """hidden_states [B, C, h, w] → [B, C, 2·h, 2·w]."""
        if not torch.compiler.is_exporting() and hidden_states.shape[0] >= 64:
            hidden_states = hidden_states.contiguous()
        return self.conv(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Denoiser(nn.Module):
    """The SDXL UNet without the layers that the two projections took over."""

    def __init__(self, unet: "UNet2DConditionModel", widths: tuple[int, ...]) -> None:
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
        `text_kv_<C>` to `ref_length`, in order, and the residuals of ControlNets, in models that have some."""
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
        sample, skips = encode(self.down_blocks, self.conv_in(latents), embedding, inputs)
        sample = self.mid_block(sample, embedding, encoder_hidden_states=inputs)
        if residuals := attention[2 * count + 3 :]:
            added = [residual.permute(0, 3, 1, 2) for residual in residuals]
            skips = [skip + residual for skip, residual in zip(skips, added[:-1], strict=True)]
            sample = sample + added[-1]
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, taken = skips[:-count], tuple(skips[-count:])
            if getattr(block, "has_cross_attention", False):
                sample = block(sample, taken, embedding, encoder_hidden_states=inputs)
            else:
                sample = block(sample, taken, embedding)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


def key_value_weight(attention: "Attention") -> Tensor:
    """[2, C, W]: of a cross-attention layer's keys, then values."""
    return torch.stack((attention.to_k.weight, attention.to_v.weight)).detach()


def split_unet(unet: "UNet2DConditionModel", adapter: IPAdapterWeights, grca: GrcaFunction) -> dict[str, nn.Module]:
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
        layers.append(key_value_weight(attention))
        pair = torch.stack((adapter_layer.to_k, adapter_layer.to_v))
        ref_weights.setdefault(attention.inner_dim, []).append(pair)
    for block in unet.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(map(Upsample, block.upsamplers))

    return {
        "text_projection": TextProjection(unet, StackedKeyValueProjection.of_layers(text_weights)),
        "reference_projection": ReferenceProjection(adapter, StackedKeyValueProjection.of_layers(ref_weights)),
        "denoiser": Denoiser(unet, tuple(sorted(text_weights))),
    }


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Guidance as a distilled UNet takes it: sines, then cosines, of 1000·(guidance − 1) at falling frequencies.

    Source: latent consistency models (arXiv 2310.04378), after variational diffusion models (arXiv 2107.00630).

    Args:
        guidance: [F] fp32.
        width: C0.

    Returns:
        [F, C0] fp32; a last column of zeros where C0 is odd.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance - 1)[:, None] * 1000.0 * frequencies
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width % 2))
