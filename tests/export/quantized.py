"""A small network with quantized layers of both kinds."""

import torch
from torch import Tensor, nn

from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges, TensorSpec
from storyadapter.quantization.layers import Fp8Layer

SPEC = NetworkSpec("products", (TensorSpec("x", ("B", 16, 8, 8)),), (TensorSpec("y", ("B", 32, 4, 4)),))
LETTERS = ShapeRanges(2, 2, Range(64, 64), Range(64, 64)).letters()


class Products(nn.Module):
    """A convolution, a linear layer over its channels, and a convolution of stride 2; values around 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 48), nn.Conv2d(48, 32, 3, padding=1, stride=2))
        self.first, self.linear, self.last = (Fp8Layer(layer.to(dtype), 4 / 448) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16, 8, 8] -> [B, 32, 4, 4]."""
        rows = self.linear(self.first(x).permute(0, 2, 3, 1))
        return self.last(rows.permute(0, 3, 1, 2))
