"""Inputs and slow references for the tests of the GEGLU and layer-norm kernels."""

import torch
from torch import Tensor
from torch.nn import functional

# ‖out - ref‖ / ‖ref‖ against fp64: rounding once, and for fp32 the order of sums and the fit of gelu
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 3e-6}


def geglu_inputs(
    rows: int, depth: int, width: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, depth], and weight [2·width, depth] and bias [2·width] as diffusers keeps them; gates reach about ±8."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((rows, depth), generator=generator, device=device)
    weight = 2 * torch.randn((2 * width, depth), generator=generator, device=device) / depth**0.5
    bias = torch.randn((2 * width,), generator=generator, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def geglu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[M, N] in fp64 from tensors as diffusers keeps them."""
    value, gate = functional.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
    return value * functional.gelu(gate)


def norm_inputs(
    rows: int, channels: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and residual [rows, channels] with means of their own, weight and bias [channels]."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((rows, channels), generator=generator, device=device)
    residual = 3 * torch.randn((rows, channels), generator=generator, device=device)
    residual += 20 * torch.randn((rows, 1), generator=generator, device=device)
    weight = 1 + torch.randn((channels,), generator=generator, device=device) / 4
    bias = torch.randn((channels,), generator=generator, device=device)
    return x.to(dtype), residual.to(dtype), weight.to(dtype), bias.to(dtype)


def norm_reference(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The layer norm of a sum, in fp64."""
    return functional.layer_norm(total.double(), total.shape[-1:], weight.double(), bias.double(), eps)


def error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖; NaN anywhere gives NaN, which passes no comparison."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
