"""The denoiser, or a ControlNet, with its transformers rewritten for speed; it computes the same up to rounding.

In each block q, k and v of the self-attention come from one matrix product, every residual addition is done together
with the layer norm that follows it, and GEGLU together with the matrix product before it. Latents stay channels-last,
so that convolutions run in the layout that tensor cores read and pictures become tokens without a copy.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.fp8_fusion import Fp8Transformer
from storyadapter.engine.inductor.operators import Operators, operators_for
from storyadapter.engine.inductor.picture_fusion import Fp8Sampler, ResnetBlock
from storyadapter.model.controlnet import ControlNet, TextInputs
from storyadapter.model.unet import CrossAttentionInputs, Denoiser, GlobalReferenceCrossAttention
from storyadapter.quantization.layers import Fp8Layer

AttentionInputs = CrossAttentionInputs | TextInputs


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
        if isinstance(self.attn2, GlobalReferenceCrossAttention):  # a ControlNet's attends to the text alone
            self.attn2.grca = operators.grca
        self.ff = GegluFeedForward(block.ff, operators)
        self.add_layer_norm = operators.add_layer_norm

    def forward(self, stream: Tensor, branch: Tensor | None, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
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
        encoder_hidden_states: AttentionInputs,
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


def fuse_denoiser(denoiser: Denoiser | ControlNet, operators: Operators) -> None:
    """Rewrite a denoiser or a ControlNet in place; it uses these operators from now on.

    Transformers always; residual blocks and samplers where their convolutions are quantized.

    Raises:
        ValueError: a transformer that isn't SDXL's (linear projections, plain layer norms, GEGLU), a residual block of
            another kind, or a transformer some of whose layers are quantized.
    """
    parts = dict(denoiser.named_modules())
    names = [name for name, part in parts.items() if isinstance(part, Transformer2DModel | ResnetBlock2D | Sampler)]
    del parts
    for name in names:  # by name: the weights of what was rewritten are let go one after the other
        parent, _, child = name.rpartition(".")
        fused = _fused(name, denoiser.get_submodule(name), operators)
        if fused is not None:
            denoiser.get_submodule(parent).register_module(child, fused)


Sampler = Upsample2D | Downsample2D


def _fused(name: str, part: nn.Module, operators: Operators) -> nn.Module | None:
    quantized = any(isinstance(layer, Fp8Layer) for layer in part.modules())
    if isinstance(part, ResnetBlock2D):
        return ResnetBlock(part, operators) if quantized else None
    if isinstance(part, Sampler):
        return Fp8Sampler(part, operators) if quantized else None
    assert isinstance(part, Transformer2DModel)
    blocks = part.transformer_blocks
    if not part.use_linear_projection or any(block.norm_type != "layer_norm" for block in blocks):
        raise ValueError(f"{name} isn't a transformer of SDXL's kind; expected linear projections and layer norms")
    return Fp8Transformer(part, operators) if quantized else Transformer(part, operators)


def prepare(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Bring a module of the contract into the form that is compiled for `device`, in place.

    Returns:
        Its parameters and buffers by name: the weights that a package reads, of this model or another of its kind.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # as of a checkpoint saved by pickle, which keeps strides
    if isinstance(module, Denoiser | ControlNet):
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
