"""Linear and convolution layers over e4m3 operands, emulated: what fp8 kernels compute, up to the order of sums.

e4m3 has 8 bits: a sign, 4 of exponent, 3 of mantissa, no infinity (Micikevicius et al., arXiv 2209.05433). A weight has
one scale per output channel, an activation one for all, fixed by calibration: value = scale · e4m3. What lies beyond
±448 is ±448, NaN stays NaN.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0  # of e4m3's numbers


def to_e4m3(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in fp32, rounded to the nearest e4m3, saturating; factor is one over the scale."""
    return (x.float() * factor).clamp(-LARGEST, LARGEST).to(E4M3)


class Fp8Layer(nn.Module):
    """What stands in place of a linear layer or a convolution; its weight takes half the bytes of fp16.

    Attributes:
        weight: as of the layer, e4m3, contiguous.
        weight_scale: [N] fp32.
        input_scale: [1] fp32.
        bias: [N] in the layer's dtype, or None.
        dtype: the layer's.
    """

    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, input_scale: float) -> None:
        super().__init__()
        weight, self.dtype = layer.weight.detach(), layer.weight.dtype
        rows = weight.flatten(1).float()
        largest = rows.abs().amax(1)
        scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
        quantized = to_e4m3(rows, 1 / scale[:, None]).view(weight.shape)
        self.weight = nn.Parameter(quantized.contiguous(), requires_grad=False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.full((1,), input_scale, device=weight.device))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.stride: tuple[int, ...] | None = layer.stride if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer, in the dtype of x."""
        weight = self.weight.float() * self.weight_scale.view(-1, *[1] * (self.weight.dim() - 1))
        rounded = (to_e4m3(x, 1 / self.input_scale).float() * self.input_scale).to(x.dtype)
        if self.stride is None:
            return functional.linear(rounded, weight.to(x.dtype), self.bias)
        return functional.conv2d(rounded, weight.to(x.dtype), self.bias, self.stride, padding=1)
