"""Linear layers and what feeds them, in half precision or over e4m3 operands.

Quantization takes no pass of its own where a kernel stands before a product: layer norms (their scale folded into
weight and bias), group norms, GEGLU and text and reference attention write e4m3; behind self-attention and at a
transformer's end the copy or sum that is there anyway does. What lies between layers has two dimensions, as kernels
with descriptors take no views.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.engine.inductor.operators import Operators
from storyadapter.quantization.layers import E4M3, LARGEST, QuantizedLayer, to_e4m3

Layer = nn.Linear | QuantizedLayer


class Fp8Product(nn.Module):
    """Weights of one or several layers that read the same input, as the kernels take them.

    Attributes:
        weight: [N, K], or [N, 9·C] of a convolution: e4m3.
        scale: [N] fp32, of input and weight; shift: [N], the bias, in the dtype of results.
        factor: [1] fp32, one over the input's scale.
    """

    scale: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(self, *layers: QuantizedLayer) -> None:
        """Raises ValueError: the scales of what they read differ."""
        super().__init__()
        first = layers[0]
        if any(not torch.equal(layer.input_scale, first.input_scale) for layer in layers):
            found = ", ".join(f"{float(layer.input_scale):g}" for layer in layers)
            raise ValueError(f"layers that read the same input have the scales {found}; expected one")
        rows = [layer.weight.movedim(1, -1).flatten(1).contiguous() for layer in layers]
        self.weight = nn.Parameter(torch.cat([row.view(torch.uint8) for row in rows]).view(E4M3), requires_grad=False)
        self.register_buffer("scale", torch.cat([layer.weight_scale for layer in layers]) * first.input_scale)
        zeros = torch.zeros_like(first.weight_scale, dtype=first.dtype)
        self.register_buffer("shift", torch.cat([zeros if x.bias is None else x.bias.detach() for x in layers]))
        self.register_buffer("factor", 1 / first.input_scale)

    def take(self, x: Tensor) -> Tensor:
        """What the product reads, from values."""
        return to_e4m3(x, self.factor)


class Fp8Linear(Fp8Product):
    """Linear layers that read the same input, as one over e4m3 rows."""

    def __init__(self, *layers: QuantizedLayer, operators: Operators) -> None:
        super().__init__(*layers)
        self.linear = operators.linear_fp8

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """rows [M, K] e4m3, residual [M, N] → [M, N]."""
        return self.linear(rows, self.weight, self.scale, self.shift, residual)


class Linear(nn.Module):
    """The same in the layers' own precision."""

    factor = None

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layers[0].weight, layers[0].bias
        if len(layers) > 1:
            assert self.bias is None  # as of queries, keys and values
            self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)

    def take(self, x: Tensor) -> Tensor:
        return x

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """rows [M, K], residual [M, N] → [M, N]."""
        out = functional.linear(rows, self.weight, self.bias)
        return out if residual is None else out + residual


def product(layers: Sequence[Layer], operators: Operators) -> Linear | Fp8Linear:
    """One product of layers that read the same input, all of which are quantized, or none."""
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
    if quantized:
        return Fp8Linear(*quantized, operators=operators)
    return Linear(*(layer for layer in layers if isinstance(layer, nn.Linear)))


class Geglu(nn.Module):
    """The first layer of a feed-forward, whose rows stand in the order that the operator reads them in."""

    factor = None

    def __init__(self, layer: nn.Linear, operators: Operators) -> None:
        super().__init__()
        weight, bias = operators.arrange_geglu(layer.weight.detach(), layer.bias.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.geglu = operators.geglu

    def forward(self, rows: Tensor, factor: None) -> Tensor:
        """rows [M, K] → [M, N]."""
        return self.geglu(rows, self.weight, self.bias)


class Fp8Geglu(Fp8Product):
    """The same over e4m3 rows; its result is e4m3, too."""

    def __init__(self, layer: QuantizedLayer, operators: Operators) -> None:
        super().__init__(layer)
        # e4m3 is moved as bytes
        weight, shift = operators.arrange_geglu(self.weight.detach().view(torch.uint8), self.shift)
        _, scale = operators.arrange_geglu(self.scale[:, None], self.scale)
        self.weight.data, self.shift, self.scale = weight.view(E4M3), shift, scale
        self.geglu = operators.geglu_fp8

    def forward(self, rows: Tensor, factor: Tensor) -> Tensor:
        """rows [M, K] e4m3, factor [1] of what reads the result → [M, N] e4m3."""
        return self.geglu(rows, self.weight, self.scale, self.shift, factor)


class AddLayerNorm(nn.Module):
    """The sum of a residual stream and a branch, and its layer norm as what reads it takes it.

    Args:
        factor: of what reads the norm; None for one in half precision.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, norm: nn.LayerNorm, factor: Tensor | None, operators: Operators) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        if factor is not None:
            for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
                folded = (tensor.detach().float() * factor).to(tensor.dtype)
                self.register_parameter(name, nn.Parameter(folded, requires_grad=False))
        self.fp8 = factor is not None
        self.add_layer_norm = operators.add_layer_norm

    def forward(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """stream, branch [M, C] → their sum, and its norm."""
        if branch is None:
            normed = functional.layer_norm(stream, stream.shape[-1:], self.weight, self.bias, self.eps)
            return stream, normed.clamp(-LARGEST, LARGEST).to(E4M3) if self.fp8 else normed
        return self.add_layer_norm(branch, stream, self.weight, self.bias, self.eps, self.fp8)
