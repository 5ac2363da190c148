"""Quantized layers in ONNX: a QuantizeLinear and a DequantizeLinear before a product of dequantized operands.

A runtime that multiplies such numbers takes the pattern for one product of them; any other computes what eager's
emulation does. Scales, and what is quantized by them, are in fp32: in half precision those of small activations would
lose digits, and ONNX Runtime takes no scale of another type than the values'.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from storyadapter.quantization.layers import QuantizedLayer


class QuantizedNodes(nn.Module):
    """Stands in place of a layer while a network is exported."""

    zero: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("zero", torch.zeros((), dtype=layer.weight.dtype, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's."""
        layer, scale = self.layer, self.layer.input_scale.reshape(())
        smoothed, form = (layer.smoothed(x), scale, self.zero), self.zero.dtype
        taken = symbolic("QuantizeLinear", smoothed, dtype=form, shape=x.shape)
        rounded = symbolic("DequantizeLinear", (taken, scale, self.zero), dtype=torch.float32, shape=x.shape)
        rows, shape = (layer.weight, layer.weight_scale), layer.weight.shape
        weight = symbolic("DequantizeLinear", rows, {"axis": 0}, dtype=torch.float32, shape=shape)
        return layer.product(rounded.to(x.dtype), weight.to(x.dtype))


@contextmanager
def as_nodes(module: nn.Module) -> Iterator[None]:
    """Inside, a network's quantized layers are exported as nodes."""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, QuantizedLayer)}

    def put(name: str, part: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, part)

    for name, layer in layers.items():
        put(name, QuantizedNodes(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            put(name, layer)
