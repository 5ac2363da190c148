"""A small network with quantized layers of both kinds."""

import torch
from torch import Tensor, nn

from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges, TensorSpec
from storyadapter.model.numerics import NumberFormat
from storyadapter.quantization.layers import OPERANDS, QuantizedLayer

SPEC = NetworkSpec("products", (TensorSpec("x", ("B", 16, 8, 8)),), (TensorSpec("y", ("B", 32, 4, 4)),))
LETTERS = ShapeRanges(2, 2, Range(64, 64), Range(64, 64)).letters()


class Products(nn.Module):
    """A convolution, a linear layer over its channels, and a convolution of stride 2; values around 1."""

    def __init__(self, dtype: torch.dtype, number_format: NumberFormat) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 48), nn.Conv2d(48, 32, 3, padding=1, stride=2))
        smoothing = tuple(0.5 + n / 32 for n in range(32)) if number_format == "int8" else ()
        self.first, self.linear, self.last = (
            QuantizedLayer(layer.to(dtype), number_format, 4 / OPERANDS[number_format].largest, factors)
            for layer, factors in zip(layers, ((), smoothing, ()), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16, 8, 8] -> [B, 32, 4, 4]."""
        rows = self.linear(self.first(x).permute(0, 2, 3, 1))
        return self.last(rows.permute(0, 3, 1, 2))
