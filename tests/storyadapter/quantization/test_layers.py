"""Emulated 8-bit layers: rounding, saturation, NaN, and how far they are from the layers that they stand for."""

import math

import pytest
import torch
from torch import nn

from storyadapter.model.numerics import NumberFormat
from storyadapter.quantization.layers import OPERANDS, QuantizedLayer, to_e4m3, to_operands

FORMATS = pytest.mark.parametrize(("form", "least", "most"), [("fp8", 0.02, 0.06), ("int8", 0.005, 0.02)])


def test_e4m3_rounds_to_even_saturates_and_keeps_nan() -> None:
    x = torch.tensor([0.0, 1.0, 1.0625, 1.1875, 448.0, 463.0, 1e9, math.inf, -math.inf, math.nan, 2**-10, 2**-9])
    found = to_e4m3(x, torch.ones(1)).float()
    assert found[:-3].tolist() == [0, 1, 1, 1.25, 448, 448, 448, 448, -448]
    assert found[9].isnan() and found[10:].tolist() == [0, 2**-9]
    assert to_e4m3(x[:2], torch.full((1,), 1e9)).float().tolist() == [0, 448]


def test_int8_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, -2.5, 127.4, 1e9, -127.6, -1e9, math.inf, -math.inf, math.nan])
    found = to_operands(x, torch.ones(1), "int8")
    assert found.dtype == torch.int8 and found.tolist() == [0, 0, 2, -2, 127, 127, -128, -128, 127, -128, 0]
    assert to_operands(x[:2], torch.full((1,), 1e9), "int8").tolist() == [0, 127]


@FORMATS
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
def test_a_layer_is_off_by_the_rounding_of_both_operands(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], form: NumberFormat, least: float, most: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    layer.weight.normal_(generator=generator)
    expected = layer(x)
    scale = float(x.abs().max()) / OPERANDS[form].largest
    quantized = QuantizedLayer(layer, form, scale)
    error = float((quantized(x) - expected).norm() / expected.norm())
    assert least < error < most
    assert quantized.weight.dtype == OPERANDS[form].dtype and quantized.weight.shape == layer.weight.shape
    wrong = QuantizedLayer(layer, form, scale / 16)  # all but the smallest inputs saturate
    assert float((wrong(x) - expected).norm() / expected.norm()) > 5 * error


@torch.no_grad()
def test_output_channels_have_scales_of_their_own() -> None:
    layer = nn.Linear(32, 3, bias=False)
    layer.weight[1] *= 1e4
    layer.weight[2] = 0
    quantized = QuantizedLayer(layer, "fp8", 1.0)
    assert torch.allclose(quantized.weight_scale[:2], layer.weight[:2].abs().amax(1) / 448)
    restored = quantized.weight.float() * quantized.weight_scale[:, None]
    assert ((restored - layer.weight).norm(dim=1) <= 0.04 * layer.weight.norm(dim=1)).all()
    assert restored[2].abs().max() == 0


@torch.no_grad()
def test_smoothing_serves_channels_of_different_size() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(100, 64) * torch.logspace(-2, 2, 64)
    layer.weight /= torch.logspace(-2, 2, 64)  # so that every channel counts
    expected, factors = layer(x), 1 / x.abs().amax(0)
    plain = QuantizedLayer(layer, "int8", float(x.abs().max()) / 127)
    smoothed = QuantizedLayer(layer, "int8", 1 / 127, tuple(factors.tolist()))
    errors = [float((each(x) - expected).norm() / expected.norm()) for each in (plain, smoothed)]
    assert errors[1] < 0.02 < 0.2 < errors[0]
    weight = smoothed.weight.float() * smoothed.weight_scale[:, None] * factors
    assert (weight - layer.weight).norm() < 0.02 * layer.weight.norm()
