"""The transformers of a quantized denoiser, whose linear layers run over e4m3 operands.

Quantization takes no pass of its own where a kernel stands before a product: layer norms (their scale folded into
weight and bias), group norms and GEGLU write e4m3; behind attention and at a transformer's end the copy or sum that is
there anyway does. What lies between layers has two dimensions, as kernels with descriptors take no views.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.operators import Operators
from storyadapter.model.unet import CrossAttentionInputs
from storyadapter.quantization.layers import E4M3, LARGEST, Fp8Layer, to_e4m3


class Fp8Product(nn.Module):
    """Weights of one or several layers that read the same input, as the kernels take them.

    Attributes:
        weight: [N, K], or [N, 9·C] of a convolution: e4m3.
        scale: [N] fp32, of input and weight; shift: [N], the bias.
        factor: [1] fp32, one over the input's scale.
    """

    scale: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(self, *layers: Fp8Layer, dtype: torch.dtype) -> None:
        """dtype: of results.

        Raises:
            ValueError: the scales of what they read differ.
        """
        super().__init__()
        first = layers[0]
        if any(not torch.equal(layer.input_scale, first.input_scale) for layer in layers):
            found = ", ".join(f"{float(layer.input_scale):g}" for layer in layers)
            raise ValueError(f"layers that read the same input have the scales {found}; expected one")
        rows = [layer.weight.movedim(1, -1).flatten(1).contiguous() for layer in layers]
        self.weight = nn.Parameter(torch.cat([row.view(torch.uint8) for row in rows]).view(E4M3), requires_grad=False)
        self.register_buffer("scale", torch.cat([layer.weight_scale for layer in layers]) * first.input_scale)
        zeros = torch.zeros_like(first.weight_scale, dtype=dtype)
        self.register_buffer("shift", torch.cat([zeros if x.bias is None else x.bias.detach() for x in layers]))
        self.register_buffer("factor", 1 / first.input_scale)


class Fp8Linear(Fp8Product):
    """Linear layers over e4m3 rows."""

    def __init__(self, *layers: Fp8Layer, dtype: torch.dtype, operators: Operators) -> None:
        super().__init__(*layers, dtype=dtype)
        self.linear = operators.linear_fp8

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """rows [M, K] e4m3, residual [M, N] → [M, N]."""
        return self.linear(rows, self.weight, self.scale, self.shift, residual)


class Fp8LayerNorm(nn.Module):
    """A layer norm that writes what a product reads."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, norm: nn.LayerNorm, product: Fp8Product, operators: Operators) -> None:
        super().__init__()
        for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
            folded = (tensor.detach().float() * product.factor).to(tensor.dtype)
            self.register_parameter(name, nn.Parameter(folded, requires_grad=False))
        self.eps = norm.eps
        self.add_layer_norm = operators.add_layer_norm

    def forward(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """stream, branch [M, C] → their sum, and its norm in e4m3."""
        if branch is None:
            normed = functional.layer_norm(stream, stream.shape[-1:], self.weight, self.bias, self.eps)
            return stream, normed.clamp(-LARGEST, LARGEST).to(E4M3)
        return self.add_layer_norm(branch, stream, self.weight, self.bias, self.eps, True)


class Fp8TransformerBlock(nn.Module):
    """One block; takes and gives the residual stream with the last branch not yet added to it."""

    def __init__(self, block: Any, operators: Operators) -> None:
        """block: a `BasicTransformerBlock` of quantized layers."""
        super().__init__()
        dtype, own, cross = block.norm1.weight.dtype, block.attn1, block.attn2

        def linear(*layers: Fp8Layer) -> Fp8Linear:
            return Fp8Linear(*layers, dtype=dtype, operators=operators)

        self.heads = own.heads
        self.to_qkv = linear(own.to_q, own.to_k, own.to_v)
        self.to_out = linear(own.to_out[0])
        self.cross_to_q, self.cross_to_out = linear(cross.to_q), linear(cross.to_out)
        self.channels, self.layer, self.grca = cross.channels, cross.layer, operators.grca
        self.feed_out = linear(block.ff.net[2])
        self.feed_in = Fp8Product(block.ff.net[0].proj, dtype=dtype)
        # in the operator's own order of rows; e4m3 is moved as bytes
        bytes_, shift = operators.arrange_geglu(self.feed_in.weight.detach().view(torch.uint8), self.feed_in.shift)
        _, scale = operators.arrange_geglu(self.feed_in.scale[:, None], self.feed_in.scale)
        self.feed_in.weight.data = bytes_.view(E4M3)
        self.feed_in.shift, self.feed_in.scale = shift, scale
        self.geglu = operators.geglu_fp8
        self.norm1 = Fp8LayerNorm(block.norm1, self.to_qkv, operators)
        self.norm2 = Fp8LayerNorm(block.norm2, self.cross_to_q, operators)
        self.norm3 = Fp8LayerNorm(block.norm3, self.feed_in, operators)

    def forward(
        self, stream: Tensor, branch: Tensor | None, batch: int, inputs: CrossAttentionInputs
    ) -> tuple[Tensor, Tensor]:
        """stream, branch [B·S, C] → the same two after this block; the stream that counts is their sum."""
        shape = (batch, -1, self.heads, self.channels // self.heads)
        stream, normed = self.norm1(stream, branch)
        q, k, v = (part.transpose(1, 2) for part in self.to_qkv(normed).view(batch, -1, 3, *shape[2:]).unbind(2))
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, self.channels)
        stream, normed = self.norm2(stream, self.to_out(to_e4m3(out, self.to_out.factor)))
        text, references = inputs.text_kv[self.channels][self.layer], inputs.ref_kv[self.channels][self.layer]
        q = self.cross_to_q(normed).view(shape)
        out = self.grca(q, text, inputs.text_row, references, inputs.ref_row, inputs.ref_length)
        out = to_e4m3(out.reshape(-1, self.channels), self.cross_to_out.factor)
        stream, normed = self.norm3(stream, self.cross_to_out(out))
        first = self.feed_in
        hidden = self.geglu(normed, first.weight, first.scale, first.shift, self.feed_out.factor)
        return stream, self.feed_out(hidden)


class Fp8Transformer(nn.Module):
    """The transformer of one resolution; stands where diffusers' blocks call a `Transformer2DModel`."""

    def __init__(self, model: Transformer2DModel, operators: Operators) -> None:
        """Raises ValueError: some of its linear layers are quantized, others aren't."""
        super().__init__()
        if plain := [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]:
            raise ValueError(
                f"{plain[0]} isn't quantized as others are; expected all of a transformer's layers, or none"
            )
        dtype = model.norm.weight.dtype
        self.norm, self.group_norm = model.norm, operators.group_norm
        self.proj_in = Fp8Linear(model.proj_in, dtype=dtype, operators=operators)
        self.proj_out = Fp8Linear(model.proj_out, dtype=dtype, operators=operators)
        self.blocks = nn.ModuleList(Fp8TransformerBlock(block, operators) for block in model.transformer_blocks)

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
        pictures, norm = hidden_states.permute(0, 2, 3, 1).contiguous(), self.norm
        settings = (norm.num_groups, norm.eps, False, self.proj_in.factor, True)
        stream, branch = self.proj_in(self.group_norm(pictures, norm.weight, norm.bias, *settings)), None
        for block in self.blocks:
            stream, branch = block(stream, branch, pictures.shape[0], encoder_hidden_states)
        rows = to_e4m3(stream + branch, self.proj_out.factor)
        return (self.proj_out(rows, pictures.flatten(0, 2)).view(pictures.shape).permute(0, 3, 1, 2),)
