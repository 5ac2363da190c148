"""The operators that a compiler doesn't make as fast as a kernel written for them, by device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.model.grca import GrcaFunction, grca

# (x [M, C], residual [M, C], weight [C], bias [C], eps) -> (x + residual, its layer norm)
AddLayerNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
# (x [M, K], weight [2·N, K], bias [2·N], both in the operator's own order of rows) -> value · gelu(gate) [M, N]
Geglu = Callable[[Tensor, Tensor, Tensor], Tensor]
# (weight [2·N, K], bias [2·N], all values before all gates) -> the same in the operator's own order of rows
ArrangeGeglu = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Operators:
    """What the denoiser's transformer blocks are made of besides matrix products and self-attention."""

    grca: GrcaFunction
    add_layer_norm: AddLayerNorm
    geglu: Geglu
    arrange_geglu: ArrangeGeglu


def operators_for(device: torch.device) -> Operators:
    """The project's Triton kernels on a CUDA device, PyTorch's operators elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from storyadapter.kernels.geglu import geglu_triton, interleave_geglu
    from storyadapter.kernels.grca.launch import grca_triton
    from storyadapter.kernels.layer_norm import add_layer_norm_triton

    return Operators(grca_triton, add_layer_norm_triton, geglu_triton, interleave_geglu)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, functional.layer_norm(total, (total.shape[-1],), weight, bias, eps)


def _geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = functional.linear(x, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _as_it_is(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight, bias


PLAIN = Operators(grca, _add_layer_norm, _geglu, _as_it_is)
