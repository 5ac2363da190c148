"""The operators that a compiler doesn't make as fast as a kernel written for them, by device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.model.grca import grca
from storyadapter.quantization.layers import E4M3, LARGEST, to_e4m3


class Grca(Protocol):
    """See `storyadapter.kernels.grca.launch.grca_triton`."""

    def __call__(
        self,
        q: Tensor,
        text_kv: Tensor,
        text_row: Tensor,
        ref_kv: Tensor,
        ref_row: Tensor,
        ref_length: Tensor,
        factor: Tensor | None,
    ) -> Tensor: ...


class AddLayerNorm(Protocol):
    """The sum of x and residual [M, C], and its layer norm, which is e4m3 with fp8."""

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, fp8: bool = False
    ) -> tuple[Tensor, Tensor]: ...


class Geglu(Protocol):
    """value · gelu(gate) [M, N] from x [M, K], weight [2·N, K] and bias [2·N], in the operator's own order of rows."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...


class ArrangeGeglu(Protocol):
    """weight [2·N, K] and bias [2·N], all values before all gates → the same in the operator's own order of rows."""

    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]: ...


class GroupNorm(Protocol):
    """See `storyadapter.kernels.group_norm.group_norm_triton`."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        factor: Tensor | None,
        tokens: bool,
    ) -> Tensor: ...


class ConvolutionFp8(Protocol):
    """See `storyadapter.kernels.products_fp8.convolution_fp8_triton`."""

    def __call__(
        self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int
    ) -> Tensor: ...


class LinearFp8(Protocol):
    """See `storyadapter.kernels.products_fp8.linear_fp8_triton`."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor: ...


class GegluFp8(Protocol):
    """See `storyadapter.kernels.products_fp8.geglu_fp8_triton`."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, factor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Operators:
    """What the denoiser's blocks are made of besides a compiler's own operators; from `group_norm` on, in fp8 alone.
    The VAE's blocks have `group_norm` in any precision."""

    grca: Grca
    add_layer_norm: AddLayerNorm
    geglu: Geglu
    arrange_geglu: ArrangeGeglu
    group_norm: GroupNorm
    convolution_fp8: ConvolutionFp8
    linear_fp8: LinearFp8
    geglu_fp8: GegluFp8


def operators_for(device: torch.device) -> Operators:
    """The project's Triton kernels on a CUDA device, PyTorch's operators elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from storyadapter.kernels.geglu import geglu_triton, interleave_geglu
    from storyadapter.kernels.grca.launch import grca_triton
    from storyadapter.kernels.group_norm import group_norm_triton
    from storyadapter.kernels.layer_norm import add_layer_norm_triton
    from storyadapter.kernels.products_fp8 import convolution_fp8_triton, geglu_fp8_triton, linear_fp8_triton

    return Operators(
        grca_triton,
        add_layer_norm_triton,
        geglu_triton,
        interleave_geglu,
        group_norm_triton,
        convolution_fp8_triton,
        linear_fp8_triton,
        geglu_fp8_triton,
    )


def _grca(
    q: Tensor,
    text_kv: Tensor,
    text_row: Tensor,
    ref_kv: Tensor,
    ref_row: Tensor,
    ref_length: Tensor,
    factor: Tensor | None,
) -> Tensor:
    out = grca(q, text_kv, text_row, ref_kv, ref_row, ref_length)
    return out if factor is None else to_e4m3(out, factor)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    normed = functional.layer_norm(total, (total.shape[-1],), weight, bias, eps)
    return total, normed.clamp(-LARGEST, LARGEST).to(E4M3) if fp8 else normed


def _geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _as_it_is(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight, bias


def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    factor: Tensor | None,
    tokens: bool,
) -> Tensor:
    out = functional.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
    out = functional.silu(out) if silu else out
    out = out if factor is None else to_e4m3(out, factor)
    return out.flatten(0, 2) if tokens else out.contiguous()


def _convolution_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int
) -> Tensor:
    window = weight.float().unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    out = functional.conv2d(x.float().permute(0, 3, 1, 2), window, stride=stride, padding=1).permute(0, 2, 3, 1)
    out = out * scale + (shift if shift.dim() == 1 else shift[:, None, None])
    return (out if residual is None else out + residual).to(shift.dtype)


def _linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
    out = functional.linear(x.float(), weight.float()) * scale + shift
    return (out if residual is None else out + residual).to(shift.dtype)


def _geglu_fp8(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    value, gate = (functional.linear(x.float(), weight.float()) * scale + shift).chunk(2, dim=-1)
    return to_e4m3(value * functional.gelu(gate), factor)


PLAIN = Operators(
    _grca,
    _add_layer_norm,
    _geglu,
    _as_it_is,
    _group_norm,
    _convolution_fp8,
    _linear_fp8,
    _geglu_fp8,
)
