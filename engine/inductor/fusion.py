"""The denoiser with its transformers rewritten for speed; what it computes stays the same up to rounding.

In each block q, k and v of the self-attention come from one matrix product, every residual addition is done together
with the layer norm that follows it, and GEGLU together with the matrix product before it. Latents stay channels-last,
so that convolutions run in the layout that tensor cores read and pictures become tokens without a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.model.grca import GrcaFunction, grca
from storyadapter.model.unet import CrossAttentionInputs, Denoiser

# (x [M, C], residual [M, C], weight [C], bias [C], eps) -> (x + residual, its layer norm)
AddLayerNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
# (x [M, K], weight [2·N, K], bias [2·N], both in the operator's own order of rows) -> value · gelu(gate) [M, N]
Geglu = Callable[[Tensor, Tensor, Tensor], Tensor]
# (weight [2·N, K], bias [2·N], all values before all gates) -> the same in the operator's own order of rows
ArrangeGeglu = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Operators:
    """What the denoiser's transformer blocks are made of besides matrix products and self-attention."""

    grca: GrcaFunction
    add_layer_norm: AddLayerNorm
    geglu: Geglu
    arrange_geglu: ArrangeGeglu


def operators_for(device: torch.device) -> Operators:
    """The project's Triton kernels on a CUDA device, PyTorch's operators elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from storyadapter.kernels.geglu import geglu_triton, interleave_geglu
    from storyadapter.kernels.grca.launch import grca_triton
    from storyadapter.kernels.layer_norm import add_layer_norm_triton

    return Operators(grca_triton, add_layer_norm_triton, geglu_triton, interleave_geglu)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, functional.layer_norm(total, (total.shape[-1],), weight, bias, eps)


def _geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _as_it_is(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight, bias


PLAIN = Operators(grca, _add_layer_norm, _geglu, _as_it_is)


class SelfAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one matrix product."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        weight = torch.cat((attention.to_q.weight, attention.to_k.weight, attention.to_v.weight))
        self.to_qkv = nn.Parameter(weight.detach(), requires_grad=False)
        self.to_out = attention.to_out[0]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S, C] → [B, S, C]."""
        batch, count, channels = tokens.shape
        qkv = functional.linear(tokens, self.to_qkv).view(batch, count, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(batch, count, channels))


class GegluFeedForward(nn.Module):
    """The block's feed-forward; the rows of the first layer stand in the order that the operator reads them in."""

    def __init__(self, feed_forward: FeedForward, operators: Operators) -> None:
        super().__init__()
        first = feed_forward.net[0].proj
        weight, bias = operators.arrange_geglu(first.weight.detach(), first.bias.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.to_out = feed_forward.net[2]
        self.geglu = operators.geglu

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S, C] → [B, S, C]."""
        hidden = self.geglu(tokens.flatten(0, 1), self.weight, self.bias)
        return self.to_out(hidden).view(tokens.shape)


class TransformerBlock(nn.Module):
    """One block; takes and gives the residual stream with the last branch not yet added to it."""

    def __init__(self, block: BasicTransformerBlock, operators: Operators) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1 = SelfAttention(block.attn1)
        self.attn2 = block.attn2
        self.attn2.grca = operators.grca
        self.ff = GegluFeedForward(block.ff, operators)
        self.add_layer_norm = operators.add_layer_norm

    def forward(self, stream: Tensor, branch: Tensor | None, inputs: CrossAttentionInputs) -> tuple[Tensor, Tensor]:
        """stream, branch [B, S, C] → the same two after this block; the stream that counts is their sum."""
        if branch is None:
            normed = self.norm1(stream)
        else:
            stream, normed = self._add(branch, stream, self.norm1)
        stream, normed = self._add(self.attn1(normed), stream, self.norm2)
        stream, normed = self._add(self.attn2(normed, inputs), stream, self.norm3)
        return stream, self.ff(normed)

    def _add(self, branch: Tensor, stream: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        total, normed = self.add_layer_norm(
            branch.flatten(0, 1), stream.flatten(0, 1), norm.weight, norm.bias, norm.eps
        )
        return total.view(stream.shape), normed.view(stream.shape)


class Transformer(nn.Module):
    """The transformer of one resolution; stands where diffusers' blocks call a `Transformer2DModel`."""

    def __init__(self, model: Transformer2DModel, operators: Operators) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = model.norm, model.proj_in, model.proj_out
        self.blocks = nn.ModuleList(TransformerBlock(block, operators) for block in model.transformer_blocks)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: CrossAttentionInputs,
        cross_attention_kwargs: None = None,
        attention_mask: None = None,
        encoder_attention_mask: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """hidden_states [B, C, h, w] → ([B, C, h, w],); the argument names are those by which diffusers calls it."""
        batch, channels, height, width = hidden_states.shape
        tokens = self.norm(hidden_states).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        stream, branch = self.proj_in(tokens), None
        for block in self.blocks:
            stream, branch = block(stream, branch, encoder_hidden_states)
        tokens = self.proj_out(stream + branch)
        return (tokens.view(batch, height, width, channels).permute(0, 3, 1, 2) + hidden_states,)


def fuse_denoiser(denoiser: Denoiser, operators: Operators) -> None:
    """Rewrite the transformers of a denoiser in place; they use these operators from now on.

    Raises:
        ValueError: a transformer that isn't SDXL's (linear projections, plain layer norms, GEGLU).
    """
    names = [name for name, part in denoiser.named_modules() if isinstance(part, Transformer2DModel)]
    for name in names:  # by name: the weights of what was rewritten are let go one after the other
        model: Transformer2DModel = denoiser.get_submodule(name)
        blocks = model.transformer_blocks
        if not model.use_linear_projection or any(block.norm_type != "layer_norm" for block in blocks):
            raise ValueError(f"{name} isn't a transformer of SDXL's kind; expected linear projections and layer norms")
        parent, _, child = name.rpartition(".")
        denoiser.get_submodule(parent).register_module(child, Transformer(model, operators))


def prepare(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Bring a module of the contract into the form that is compiled for `device`, in place.

    Returns:
        Its parameters and buffers by name: the weights that a package reads, of this model or another of its kind.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # as of a checkpoint saved by pickle, which keeps strides
    if isinstance(module, Denoiser):
        fuse_denoiser(module, operators_for(device))
    if device.type == "cuda":
        channels_last(module)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def channels_last(module: nn.Module) -> None:
    """Bring the weights of all 2-D convolutions to channels-last."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.to(memory_format=torch.channels_last)
