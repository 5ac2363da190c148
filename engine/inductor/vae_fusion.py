"""The VAE's decoder rewritten for speed: pictures lie channels-last from the latents to the last convolution.

Every group norm and the SiLU behind it are one operator, and so are a convolution's bias and a block's residual for the
compiler. Of a quantized decoder that operator writes e4m3, and the convolutions add bias and residual before their one
rounding. The attention over all pixels has one head as wide as the picture's channels (512), wider than any fused
attention takes at a matrix product's rate, so it is two plain products and a softmax, for a quarter of the queries at a
time, which bounds the memory of its scores.
"""

from typing import Final

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.operators import Operators
from storyadapter.engine.inductor.picture_fusion import Fp8Sampler, ResnetBlock
from storyadapter.model.modules import VaeDecoder
from storyadapter.quantization.layers import QuantizedLayer

CHANNEL_UNIT: Final = 16  # of the group norm's operator
_PARTS: Final = 4  # of the queries


class PictureAttention(nn.Module):
    """Stands where diffusers' blocks call an `Attention` over the pixels of pictures."""

    def __init__(self, attention: Attention, operators: Operators) -> None:
        """Raises ValueError: an attention of another kind than SDXL's VAE has."""
        super().__init__()
        plain = attention.heads == 1 and attention.residual_connection and attention.rescale_output_factor == 1.0
        if not plain or attention.group_norm is None or attention.spatial_norm is not None:
            raise ValueError("the VAE's attention isn't of SDXL's kind; expected one head, a group norm and a residual")
        self.norm, self.group_norm = attention.group_norm, operators.group_norm
        parts = attention.to_q, attention.to_k, attention.to_v
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]).detach(), requires_grad=False)
        biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
        self.bias = nn.Parameter(torch.cat(biases).detach(), requires_grad=False)
        self.to_out = attention.to_out[0]

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:
        """hidden_states [F, C, h, w] → the same; h·w a multiple of 4."""
        pictures = hidden_states.permute(0, 2, 3, 1).contiguous()
        norm, (_, height, width, channels) = self.norm, pictures.shape
        tokens = self.group_norm(pictures, norm.weight, norm.bias, norm.num_groups, norm.eps, False, None, True)
        qkv = functional.linear(tokens, self.weight, self.bias)
        attended = [self._attend(part, channels) for part in qkv.view(-1, height * width, 3 * channels).unbind()]
        out = self.to_out(torch.cat(attended)).view(-1, height, width, channels)
        return (out + pictures).permute(0, 3, 1, 2)

    @staticmethod
    def _attend(qkv: Tensor, channels: int) -> Tensor:
        """[S, 3·C] → [S, C]; matrices, not batches of them, which the compiler would make into one fused attention."""
        q, k, v = qkv.split(channels, 1)
        q = q * channels**-0.5
        return torch.cat([torch.softmax(part @ k.T, -1) @ v for part in q.unflatten(0, (_PARTS, -1)).unbind()])


class NormAndSilu(nn.Module):
    """The norm before the last convolution, and the SiLU behind it."""

    def __init__(self, norm: nn.GroupNorm, operators: Operators) -> None:
        super().__init__()
        self.norm, self.group_norm = norm, operators.group_norm

    def forward(self, pictures: Tensor) -> Tensor:
        """[F, C, h, w] → the same."""
        norm, x = self.norm, pictures.permute(0, 2, 3, 1).contiguous()
        out = self.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True, None, False)
        return out.permute(0, 3, 1, 2)


def fuse_vae(vae: VaeDecoder, operators: Operators) -> None:
    """Rewrite a decoder in place. Blocks whose channels the operator doesn't take (a multiple of 16) stay as they are.

    Raises:
        ValueError: a block or an attention of another kind than SDXL's VAE has.
    """
    decoder = vae.decoder
    for name, part in list(decoder.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(part, ResnetBlock2D) and _fits(part.norm1) and _fits(part.norm2):
            decoder.get_submodule(parent).register_module(child, ResnetBlock(part, operators))
        elif isinstance(part, Attention) and _fits(part.group_norm):
            decoder.get_submodule(parent).register_module(child, PictureAttention(part, operators))
        elif isinstance(part, Upsample2D) and isinstance(part.conv, QuantizedLayer):
            decoder.get_submodule(parent).register_module(child, Fp8Sampler(part, operators))
    if _fits(decoder.conv_norm_out):
        decoder.conv_norm_out = NormAndSilu(decoder.conv_norm_out, operators)
        decoder.conv_act = nn.Identity()


def _fits(norm: nn.Module | None) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.num_channels % CHANNEL_UNIT == 0
