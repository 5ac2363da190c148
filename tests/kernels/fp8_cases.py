"""Inputs and slow references for the tests of the fp8 products and of the group norm."""

import torch
from torch import Tensor
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
# ‖out - ref‖ / ‖ref‖ against fp64 on the same e4m3 operands: fp16 rounded once, and on tensor cores sums in fp32 of
# which some 14 bits count; an e4m3 result is rounded to 3 bits
PRODUCT_TOLERANCE = 1.5e-3
E4M3_TOLERANCE = 3e-2


def convolution_inputs(
    batch: int, height: int, width: int, channels: int, columns: int, stride: int, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, h, w, C] and weight [N, 9·C] e4m3, scale [N] fp32, shift [B, N] and residual [B, h', w', N] fp16."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = torch.rand((columns,), generator=generator, device=device) / (9 * channels) ** 0.5
    x, weight = normal(batch, height, width, channels).to(E4M3), normal(columns, 9 * channels).to(E4M3)
    residual = normal(batch, height // stride, width // stride, columns).half()
    return x, weight, scale, normal(batch, columns).half(), residual


def convolution_reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int
) -> Tensor:
    """[B, h', w', N] in fp64."""
    window = weight.double().unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    out = functional.conv2d(x.double().permute(0, 3, 1, 2), window, stride=stride, padding=1).permute(0, 2, 3, 1)
    out = out * scale.double() + (shift.double() if shift.dim() == 1 else shift.double()[:, None, None])
    return out if residual is None else out + residual.double()


def linear_inputs(
    rows: int, depth: int, columns: int, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [M, K] and weight [N, K] e4m3, scale [N] fp32, shift [N] and residual [M, N] fp16."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = torch.rand((columns,), generator=generator, device=device) * 2 / depth**0.5
    x, weight = normal(rows, depth).to(E4M3), normal(columns, depth).to(E4M3)
    return x, weight, scale, normal(columns).half(), normal(rows, columns).half()


def linear_reference(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    """[M, N] in fp64."""
    out = x.double() @ weight.double().T * scale.double() + shift.double()
    return out if residual is None else out + residual.double()


def gated(product: Tensor) -> Tensor:
    """value · gelu(gate): [M, N] from [M, 2·N], all values before all gates."""
    value, gate = product.chunk(2, -1)
    return value * functional.gelu(gate)


def rows_interleaved(tensor: Tensor) -> Tensor:
    """The rows of an e4m3 matrix or of a vector in the order of `interleave_geglu`, written down once more."""
    return tensor.unflatten(0, (2, -1, 8)).transpose(0, 1).flatten(0, 2).contiguous()


def group_norm_inputs(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, h, w, C] whose channels lie far from zero, weight and bias [C]."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((batch, height, width, channels), generator=generator, device=device) + 30
    weight = 1 + torch.randn((channels,), generator=generator, device=device) / 4
    bias = torch.randn((channels,), generator=generator, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def group_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """[B, h, w, C] in fp64."""
    pictures = x.double().permute(0, 3, 1, 2)
    out = functional.group_norm(pictures, groups, weight.double(), bias.double(), eps).permute(0, 2, 3, 1)
    return functional.silu(out) if silu else out
