"""Linear and convolution layers over 8-bit operands, emulated: what kernels compute, up to the order of sums.

Operands are e4m3 or int8. e4m3 has a sign, 4 bits of exponent, 3 of mantissa, no infinity (Micikevicius et al., arXiv
2209.05433). A weight has one scale per output channel, an activation one for all, fixed by calibration: value = scale ·
operand. What lies beyond the range saturates. With SmoothQuant (Xiao et al., arXiv 2211.10438) every input channel of a
linear layer is multiplied by a factor of its own before it is rounded, and the weight divided by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.model.numerics import NumberFormat

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0  # of e4m3's numbers


@dataclass(frozen=True)
class Operands:
    """The values of a number format."""

    dtype: torch.dtype
    least: float
    largest: float  # what a tensor's largest magnitude becomes


OPERANDS: Final[Mapping[NumberFormat, Operands]] = {
    "fp8": Operands(E4M3, -LARGEST, LARGEST),
    "int8": Operands(torch.int8, -128.0, 127.0),
}


def to_operands(x: Tensor, factor: Tensor, number_format: NumberFormat) -> Tensor:
    """x · factor in fp32, rounded to the nearest operand, to even, saturating; factor is one over the scale.

    NaN stays NaN in e4m3; int8 has none, and it becomes 0: residual additions, in half precision, still tell it.
    """
    operands = OPERANDS[number_format]
    scaled = (x.float() * factor).clamp(operands.least, operands.largest)
    return (scaled if operands.dtype.is_floating_point else scaled.nan_to_num().round()).to(operands.dtype)


def to_e4m3(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor in fp32, rounded to the nearest e4m3, saturating; factor is one over the scale."""
    return to_operands(x, factor, "fp8")


class QuantizedLayer(nn.Module):
    """What stands in place of a linear layer or a convolution; its weight takes half the bytes of fp16.

    Attributes:
        number_format: of weight and rounded input.
        weight: as of the layer, divided by `smoothing`, in the number format, contiguous.
        weight_scale: [N] fp32.
        input_scale: [1] fp32, of the smoothed input.
        smoothing: [K] fp32, what a linear layer's input channels are multiplied by; None for nothing.
        bias: [N] in the layer's dtype, or None.
        dtype: the layer's.
    """

    weight_scale: Tensor
    input_scale: Tensor
    smoothing: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        number_format: NumberFormat,
        input_scale: float,
        smoothing: Sequence[float] = (),
    ) -> None:
        super().__init__()
        weight, self.dtype, self.number_format = layer.weight.detach(), layer.weight.dtype, number_format
        rows = weight.flatten(1).float()
        factors = torch.tensor(smoothing, dtype=torch.float32, device=weight.device) if smoothing else None
        if factors is not None:
            rows = rows / factors
        largest = rows.abs().amax(1)
        scale = torch.where(largest > 0, largest / OPERANDS[number_format].largest, torch.ones_like(largest))
        quantized = to_operands(rows, 1 / scale[:, None], number_format).view(weight.shape)
        self.weight = nn.Parameter(quantized.contiguous(), requires_grad=False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.full((1,), input_scale, device=weight.device))
        self.register_buffer("smoothing", factors)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.stride: tuple[int, ...] | None = layer.stride if isinstance(layer, nn.Conv2d) else None

    def smoothed(self, x: Tensor) -> Tensor:
        """x in fp32, as it is to be rounded."""
        return x.float() if self.smoothing is None else x.float() * self.smoothing

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of dequantized operands."""
        if self.stride is None:
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, self.stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer, in the dtype of x."""
        weight = self.weight.float() * self.weight_scale.view(-1, *[1] * (self.weight.dim() - 1))
        rounded = to_operands(self.smoothed(x), 1 / self.input_scale, self.number_format).float() * self.input_scale
        return self.product(rounded.to(x.dtype), weight.to(x.dtype))
