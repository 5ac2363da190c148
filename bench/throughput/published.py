"""The published way to denoise, on diffusers' UNet: nothing cached, nothing shared.

Every step projects text and references again, every row has its own copy of them, and the unconditional rows attend to
N copies of the same four tokens. Sources: Story-Adapter (arXiv 2410.06244) and IP-Adapter (arXiv 2308.06721) with their
public implementations' attention processors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from storyadapter.bench.throughput.inputs import CaseInputs
from storyadapter.checkpoint import IPAdapterWeights
from storyadapter.method import constants
from storyadapter.method.sampler import SamplerTable, scale_input, step, timestep_at

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, tokens, D] -> [B, H, S, D]


def materialized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores written to memory, softmax over them, second product: what the published processors do."""
    batch, heads, tokens, size = q.shape
    q, k, v = (tensor.reshape(batch * heads, -1, size) for tensor in (q, k, v))
    scores = torch.empty(batch * heads, tokens, k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, tokens, size)


@dataclass(frozen=True)
class SelfAttention:
    """Processor of a self-attention layer."""

    attend: Attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        q, k, v = (_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class CrossAttention:
    """Processor of a cross-attention layer; behind the 77 text tokens come those of the references."""

    attend: Attend
    to_k: Tensor
    to_v: Tensor
    scale: float

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        text, tokens = encoder_hidden_states.split(
            [constants.TEXT_TOKENS, encoder_hidden_states.shape[1] - constants.TEXT_TOKENS], dim=1
        )
        q = _heads(attn.to_q(hidden_states), attn.heads)
        out = self.attend(q, _heads(attn.to_k(text), attn.heads), _heads(attn.to_v(text), attn.heads))
        key, value = _heads(linear(tokens, self.to_k), attn.heads), _heads(linear(tokens, self.to_v), attn.heads)
        out = out + self.scale * self.attend(q, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _heads(features: Tensor, heads: int) -> Tensor:
    return features.unflatten(-1, (heads, -1)).transpose(1, 2)


def install(unet: UNet2DConditionModel, adapter: IPAdapterWeights, attend: Attend, scale: float) -> None:
    """Give every attention layer of the UNet the published processors, with this way to attend."""
    layers = {f"{layer.module}.processor": layer for layer in adapter.layers}
    unet.set_attn_processor(
        {
            name: CrossAttention(attend, layers[name].to_k, layers[name].to_v, scale)
            if name in layers
            else SelfAttention(attend)
            for name in unet.attn_processors
        }
    )


def reference_tokens(adapter: IPAdapterWeights, image_embedding: Tensor) -> Tensor:
    """Image embeddings [N, D] → their tokens [4·N, X]."""
    width = len(adapter.norm_weight)
    tokens = linear(image_embedding, adapter.projection_weight, adapter.projection_bias).view(-1, width)
    return layer_norm(tokens, (width,), adapter.norm_weight, adapter.norm_bias)


def text_rows(inputs: CaseInputs, frames: range) -> tuple[Tensor, Tensor, Tensor]:
    """Text embeddings [2·F, T, X], pooled text and sizes of some frames, unconditional rows first."""
    encoded = inputs.text
    rows = torch.tensor([0] * len(frames) + [1 + frame for frame in frames], device=encoded["sizes"].device)
    text = torch.cat((encoded["text_embedding"], encoded["text_embedding_2"]), dim=-1)
    return text[rows], encoded["pooled_text"][rows], encoded["sizes"][rows]


def denoise_with(predict: Callable[[Tensor, Tensor], Tensor], inputs: CaseInputs, table: SamplerTable,
                 frames: range, dtype: torch.dtype) -> Iterator[Tensor]:  # fmt: skip
    """The plain denoising loop around a UNet; yields the state [F, 4, h, w] fp32 after each step.

    Args:
        predict: latents [2·F, 4, h, w] and time step [] → the prediction of both halves.
    """
    device = inputs.image_embedding.device
    coefficients = table.coefficients(device)
    x = table.initial_latents(inputs.noise.initial).to(device).expand(len(frames), -1, -1, -1).contiguous()
    x0 = torch.zeros_like(x)
    for call in range(table.calls):
        with torch.inference_mode():
            index = torch.full((1,), call, dtype=torch.int64, device=device)
            latents = scale_input(coefficients, index, x).to(dtype)
            prediction = predict(torch.cat((latents, latents)), timestep_at(coefficients, index)[0])
            unconditional, conditional = prediction.float().chunk(2)
            output = unconditional + constants.GUIDANCE * (conditional - unconditional)
            x, x0 = step(coefficients, index, x, output, x0, None)
        yield x


def published_steps(
    unet: UNet2DConditionModel, adapter: IPAdapterWeights, inputs: CaseInputs, table: SamplerTable, frames: range
) -> Iterator[Tensor]:
    """The loop of the published method over some frames of a case, on a UNet with its processors installed."""
    with torch.inference_mode():
        text, pooled, sizes = text_rows(inputs, frames)
        tokens = reference_tokens(adapter, inputs.image_embedding).expand(len(frames), -1, -1)
        no_tokens = reference_tokens(adapter, torch.zeros_like(inputs.image_embedding)).expand(len(frames), -1, -1)
        hidden = torch.cat((text, torch.cat((no_tokens, tokens))), dim=1)
    added = {"text_embeds": pooled, "time_ids": sizes}

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return unet(latents, timestep, hidden, added_cond_kwargs=added, return_dict=False)[0]

    return denoise_with(predict, inputs, table, frames, unet.dtype)
