"""Residual blocks and samplers over pictures that lie channels-last: a quantized denoiser's, and the VAE's."""

from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.operators import Operators
from storyadapter.engine.inductor.products import Fp8Product
from storyadapter.model.unet import Upsample
from storyadapter.quantization.layers import QuantizedLayer


class Fp8Convolution(Fp8Product):
    """A 3×3 convolution over e4m3 pictures."""

    def __init__(self, layer: QuantizedLayer, operators: Operators) -> None:
        assert layer.stride is not None
        super().__init__(layer)
        self.convolution, self.stride = operators.convolution_fp8, layer.stride[0]

    def forward(self, x: Tensor, added: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x [B, h, w, C] e4m3, added [B, N], residual as the result → [B, h / stride, w / stride, N]."""
        shift = self.shift if added is None else self.shift + added
        return self.convolution(x, self.weight, self.scale, shift, residual, self.stride)


class Convolution(nn.Module):
    """One that a recipe keeps in half precision."""

    factor = None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, added: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """As `Fp8Convolution`, from x in the layer's dtype."""
        out = self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = out if added is None else out + added[:, None, None]
        return out if residual is None else out + residual


class ResnetBlock(nn.Module):
    """A residual block with fused norms; stands where diffusers' blocks call a `ResnetBlock2D`."""

    def __init__(self, block: ResnetBlock2D, operators: Operators) -> None:
        """Raises ValueError: a block of another kind than SDXL's."""
        super().__init__()
        added = block.time_embedding_norm == "default" or block.time_emb_proj is None
        if not added or block.up or block.down or block.output_scale_factor != 1.0:
            raise ValueError(
                "a residual block isn't of SDXL's kind; expected a time embedding that is added or none, no sampler"
            )
        self.norm1, self.norm2, self.group_norm = block.norm1, block.norm2, operators.group_norm
        self.conv1, self.conv2 = (
            Fp8Convolution(layer, operators) if isinstance(layer, QuantizedLayer) else Convolution(layer)
            for layer in (block.conv1, block.conv2)
        )
        self.time_emb_proj, self.conv_shortcut = block.time_emb_proj, block.conv_shortcut

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """input_tensor [B, C, h, w], temb [B, E] (none in a VAE) → [B, N, h, w]."""
        pictures = input_tensor.permute(0, 2, 3, 1).contiguous()
        added = None if temb is None else self.time_emb_proj(functional.silu(temb))
        hidden = self.conv1(self._normed(pictures, self.norm1, self.conv1.factor), added)
        hidden = self._normed(hidden.contiguous(), self.norm2, self.conv2.factor)
        if self.conv_shortcut is not None:
            pictures = self.conv_shortcut(input_tensor).permute(0, 2, 3, 1).contiguous()
        return self.conv2(hidden, residual=pictures).permute(0, 3, 1, 2)

    def _normed(self, x: Tensor, norm: nn.GroupNorm, factor: Tensor | None) -> Tensor:
        return self.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True, factor, False)


class Fp8Sampler(nn.Module):
    """Stands where diffusers' blocks call one of these samplers, whose convolution is quantized."""

    def __init__(self, sampler: Upsample | Upsample2D | Downsample2D, operators: Operators) -> None:
        super().__init__()
        self.convolution = Fp8Convolution(sampler.conv, operators)

    def forward(self, hidden_states: Tensor, *unused: Any) -> Tensor:
        """hidden_states [B, C, h, w] → twice or half as large."""
        if self.convolution.stride == 1:
            hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        pictures = self.convolution.take(hidden_states.permute(0, 2, 3, 1))
        return self.convolution(pictures.contiguous()).permute(0, 3, 1, 2)
