"""Emulated fp8 layers: rounding, saturation, NaN, and how far they are from the layers that they stand for."""

import math

import pytest
import torch
from torch import nn

from storyadapter.quantization.layers import E4M3, Fp8Layer, to_e4m3


def test_e4m3_rounds_to_even_saturates_and_keeps_nan() -> None:
    x = torch.tensor([0.0, 1.0, 1.0625, 1.1875, 448.0, 463.0, 1e9, math.inf, -math.inf, math.nan, 2**-10, 2**-9])
    found = to_e4m3(x, torch.ones(1)).float()
    assert found[:-3].tolist() == [0, 1, 1, 1.25, 448, 448, 448, 448, -448]
    assert found[9].isnan() and found[10:].tolist() == [0, 2**-9]
    assert to_e4m3(x[:2], torch.full((1,), 1e9)).float().tolist() == [0, 448]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(64, 48), (5, 64)),
        (nn.Linear(64, 48, bias=False), (2, 3, 64)),
        (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 5, 7)),
        (nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 6, 8)),
    ],
)
@torch.no_grad()
def test_a_layer_is_off_by_the_rounding_of_both_operands(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    layer.weight.normal_(generator=generator)
    expected = layer(x)
    quantized = Fp8Layer(layer, float(x.abs().max()) / 448)
    error = float((quantized(x) - expected).norm() / expected.norm())
    assert 0.02 < error < 0.06
    assert quantized.weight.dtype == E4M3 and quantized.weight.shape == layer.weight.shape
    wrong = Fp8Layer(layer, float(x.abs().max()) / 448 / 16)  # all but the smallest inputs saturate
    assert float((wrong(x) - expected).norm() / expected.norm()) > 5 * error


@torch.no_grad()
def test_output_channels_have_scales_of_their_own() -> None:
    layer = nn.Linear(32, 3, bias=False)
    layer.weight[1] *= 1e4
    layer.weight[2] = 0
    quantized = Fp8Layer(layer, 1.0)
    assert torch.allclose(quantized.weight_scale[:2], layer.weight[:2].abs().amax(1) / 448)
    restored = quantized.weight.float() * quantized.weight_scale[:, None]
    assert ((restored - layer.weight).norm(dim=1) <= 0.04 * layer.weight.norm(dim=1)).all()
    assert restored[2].abs().max() == 0
