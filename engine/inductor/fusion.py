"""The denoiser, or a ControlNet, with its transformers rewritten for speed; it computes the same up to rounding.

In each block q, k and v of the self-attention come from one matrix product, every residual addition is done together
with the layer norm that follows it, and GEGLU together with the matrix product before it. Latents stay channels-last,
so that convolutions run in the layout that tensor cores read and pictures become tokens without a copy. Tokens lie in
rows [B·S, C] from a transformer's begin to its end. `storyadapter.engine.inductor.products` has the layers, in half
precision or over e4m3 operands.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.operators import Operators, operators_for
from storyadapter.engine.inductor.picture_fusion import Fp8Sampler, ResnetBlock
from storyadapter.engine.inductor.products import AddLayerNorm, Fp8Geglu, Geglu, product
from storyadapter.engine.inductor.vae_fusion import fuse_vae
from storyadapter.model.controlnet import ControlNet, TextCrossAttention, TextInputs, text_attention
from storyadapter.model.modules import VaeDecoder
from storyadapter.model.unet import CrossAttentionInputs, Denoiser, GlobalReferenceCrossAttention, Upsample
from storyadapter.quantization.layers import QuantizedLayer

AttentionInputs = CrossAttentionInputs | TextInputs


class SelfAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one matrix product."""

    def __init__(self, attention: Attention, operators: Operators) -> None:
        super().__init__()
        self.heads = attention.heads
        self.to_qkv = product((attention.to_q, attention.to_k, attention.to_v), operators)
        self.to_out = product((attention.to_out[0],), operators)

    def forward(self, rows: Tensor, batch: int) -> Tensor:
        """rows [B·S, C] → the same."""
        qkv = self.to_qkv(rows)
        channels = qkv.shape[1] // 3
        q, k, v = (
            part.transpose(1, 2) for part in qkv.view(batch, -1, 3, self.heads, channels // self.heads).unbind(2)
        )
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(self.to_out.take(out.transpose(1, 2).reshape(-1, channels)))


class CrossAttention(nn.Module):
    """Global reference cross-attention between its two products; a ControlNet's attends to the text alone."""

    def __init__(self, attention: GlobalReferenceCrossAttention | TextCrossAttention, operators: Operators) -> None:
        super().__init__()
        self.heads, self.channels, self.layer = attention.heads, attention.channels, attention.layer
        self.to_q = product((attention.to_q,), operators)
        self.to_out = product((attention.to_out,), operators)
        self.grca = operators.grca

    def forward(self, rows: Tensor, batch: int, inputs: AttentionInputs) -> Tensor:
        """rows [B·S, C] → the same."""
        q = self.to_q(rows).view(batch, -1, self.heads, self.channels // self.heads)
        text = inputs.text_kv[self.channels][self.layer]
        if isinstance(inputs, TextInputs):
            out = self.to_out.take(text_attention(q, text, inputs.text_row))
        else:
            references, factor = inputs.ref_kv[self.channels][self.layer], self.to_out.factor
            out = self.grca(q, text, inputs.text_row, references, inputs.ref_row, inputs.ref_length, factor)
        return self.to_out(out.reshape(-1, self.channels))


class GegluFeedForward(nn.Module):
    """The block's feed-forward."""

    def __init__(self, feed_forward: FeedForward, operators: Operators) -> None:
        super().__init__()
        first = feed_forward.net[0].proj
        self.geglu = Fp8Geglu(first, operators) if isinstance(first, QuantizedLayer) else Geglu(first, operators)
        self.to_out = product((feed_forward.net[2],), operators)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B·S, C] → the same."""
        return self.to_out(self.geglu(rows, self.to_out.factor))


class TransformerBlock(nn.Module):
    """One block; takes and gives the residual stream with the last branch not yet added to it."""

    def __init__(self, block: BasicTransformerBlock, operators: Operators) -> None:
        super().__init__()
        self.attn1 = SelfAttention(block.attn1, operators)
        self.attn2 = CrossAttention(block.attn2, operators)
        self.ff = GegluFeedForward(block.ff, operators)
        self.norm1 = AddLayerNorm(block.norm1, self.attn1.to_qkv.factor, operators)
        self.norm2 = AddLayerNorm(block.norm2, self.attn2.to_q.factor, operators)
        self.norm3 = AddLayerNorm(block.norm3, self.ff.geglu.factor, operators)

    def forward(
        self, stream: Tensor, branch: Tensor | None, batch: int, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """stream, branch [B·S, C] → the same two after this block; the stream that counts is their sum."""
        stream, normed = self.norm1(stream, branch)
        stream, normed = self.norm2(stream, self.attn1(normed, batch))
        stream, normed = self.norm3(stream, self.attn2(normed, batch, inputs))
        return stream, self.ff(normed)


class Transformer(nn.Module):
    """The transformer of one resolution; stands where diffusers' blocks call a `Transformer2DModel`."""

    def __init__(self, model: Transformer2DModel, operators: Operators) -> None:
        """Raises ValueError: some of its linear layers are quantized, others aren't."""
        super().__init__()
        layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | QuantizedLayer)}
        plain = [name for name, part in layers.items() if isinstance(part, nn.Linear)]
        if 0 < len(plain) < len(layers):
            raise ValueError(
                f"{plain[0]} isn't quantized as others are; expected all of a transformer's layers, or none"
            )
        self.norm, self.group_norm = model.norm, operators.group_norm
        self.proj_in, self.proj_out = (product((layer,), operators) for layer in (model.proj_in, model.proj_out))
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
        pictures, norm = hidden_states.permute(0, 2, 3, 1).contiguous(), self.norm
        if self.proj_in.factor is None:  # the compiler's own group norm is as fast there
            rows = norm(hidden_states).permute(0, 2, 3, 1).reshape(-1, pictures.shape[3])
        else:
            settings = (norm.num_groups, norm.eps, False, self.proj_in.factor, True)
            rows = self.group_norm(pictures, norm.weight, norm.bias, *settings)
        stream, branch = self.proj_in(rows), None
        for block in self.blocks:
            stream, branch = block(stream, branch, pictures.shape[0], encoder_hidden_states)
        assert branch is not None
        rows = self.proj_out.take(stream + branch)
        return (self.proj_out(rows, pictures.flatten(0, 2)).view(pictures.shape).permute(0, 3, 1, 2),)


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


Sampler = Upsample | Downsample2D


def _fused(name: str, part: nn.Module, operators: Operators) -> nn.Module | None:
    quantized = any(isinstance(layer, QuantizedLayer) for layer in part.modules())
    if isinstance(part, ResnetBlock2D):
        return ResnetBlock(part, operators) if quantized else None
    if isinstance(part, Sampler):
        return Fp8Sampler(part, operators) if quantized else None
    assert isinstance(part, Transformer2DModel)
    blocks = part.transformer_blocks
    if not part.use_linear_projection or any(block.norm_type != "layer_norm" for block in blocks):
        raise ValueError(f"{name} isn't a transformer of SDXL's kind; expected linear projections and layer norms")
    return Transformer(part, operators)


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
        if isinstance(module, VaeDecoder):
            fuse_vae(module, operators_for(device))
        channels_last(module)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def channels_last(module: nn.Module) -> None:
    """Bring the weights of all 2-D convolutions to channels-last."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.to(memory_format=torch.channels_last)
