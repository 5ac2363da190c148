"""What the kernels are compared with: the ways to compute the same functions that PyTorch users have."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from storyadapter.bench.throughput.published import Attend, materialized


@dataclass(frozen=True)
class Baseline:
    """A way to compute a case from the inputs that the case has for baselines."""

    name: str  # as in the report
    run: Callable[..., Any]  # the call that is timed
    cuda_only: bool = False  # can't run on a CPU, or takes longer to compile there than the benchmark
    built_per_shape: bool = False  # compiles for seconds at every new shape; measured at one batch size only
    # what it has to give, from the case's inputs, in fp32, if it is only a part of the case's function: a bound, and no
    # alternative
    expected: Callable[..., Any] | None = None


def grca_baselines() -> list[Baseline]:
    """All of them, from q [B, S, H, D], text_k, text_v, ref_k and ref_v [B, H, keys, D]; result as q.

    xformers only where it is installed. FlexAttention has one softmax per call and can't express two, so it is called
    twice like the others.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else the shapes of earlier cases use up the recompile limit, and it runs unfused
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    found = [
        _two("SDPA flash", functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
        _two("SDPA memory-efficient", functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
        _two("SDPA cuDNN", functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
        Baseline("published (materialized scores)", functools.partial(_two_and_add, materialized)),
        _two("FlexAttention", lambda q, k, v: compiled(q, k, v), built_per_shape=True),
    ]
    if find_spec("xformers") is not None:
        found.append(_two("xformers", _xformers))
    return found


def _two(name: str, attention: Attend, built_per_shape: bool = False) -> Baseline:
    return Baseline(f"{name} ×2 + add", functools.partial(_two_and_add, attention), True, built_per_shape)


def _two_and_add(attention: Attend, q: Tensor, text_k: Tensor, text_v: Tensor, ref_k: Tensor, ref_v: Tensor) -> Tensor:
    q = q.transpose(1, 2)
    return (attention(q, text_k, text_v) + attention(q, ref_k, ref_v)).transpose(1, 2)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def geglu_baselines() -> list[Baseline]:
    """The product alone, a bound that leaves the activation out, and with compiled activation."""
    compiled_gate = torch.compile(gate, dynamic=False)

    def linear_and_gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return compiled_gate(functional.linear(x, weight, bias))

    def product(*inputs: Tensor) -> Tensor:
        return functional.linear(*(tensor.float() for tensor in inputs))

    return [
        Baseline("F.linear alone", functional.linear, expected=product),
        Baseline("F.linear + compiled elementwise GEGLU", linear_and_gate, cuda_only=True),
    ]


def gate(product: Tensor) -> Tensor:
    """value · gelu(gate): [M, N] from [M, 2·N], all values before all gates."""
    value, gates = product.chunk(2, -1)
    return value * functional.gelu(gates)


def layer_norm_baselines(eps: float) -> list[Baseline]:
    """Eager PyTorch: two kernels; sum and norm, both [M, C]."""

    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, functional.layer_norm(total, total.shape[-1:], weight, bias, eps)

    return [Baseline("eager add + layer_norm", add_layer_norm)]


def convolution_baselines() -> list[Baseline]:
    """cuDNN in half precision, channels-last; it adds no residual in its own kernel."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return (functional.conv2d(x, weight, bias, padding=1) + residual).permute(0, 2, 3, 1)

    return [Baseline("F.conv2d + residual in half precision", convolution)]


def geglu_fp8_baselines() -> list[Baseline]:
    """As for `geglu_baselines`, whose fused kernel is measured beside; 16 times the result, as the case has it."""
    compiled_gate = torch.compile(gate, dynamic=False)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 16 * compiled_gate(functional.linear(x, weight, bias))

    return [Baseline("F.linear + compiled elementwise GEGLU, half precision", layer, cuda_only=True)]


def group_norm_baselines(groups: int, eps: float) -> list[Baseline]:
    """PyTorch's, eager and compiled."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.silu(functional.group_norm(x, groups, weight, bias, eps)).permute(0, 2, 3, 1)

    compiled = torch.compile(norm, dynamic=False)
    return [Baseline("eager group_norm + silu", norm), Baseline("compiled group_norm + silu", compiled, cuda_only=True)]
