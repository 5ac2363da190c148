"""What the fused kernel is compared with: the ways to compute the same function that PyTorch users have."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from storyadapter.bench.kernel_cases import ExpandedInputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """A way to compute GRCA from expanded keys and values.

    Attributes:
        name: as in the report.
        run: the call that is timed; result [B, H, S, D].
        cuda_only: can't run on a CPU.
        built_per_shape: compiles for seconds at every new shape; measured at one batch size only.
    """

    name: str
    run: Callable[[ExpandedInputs], Tensor]
    cuda_only: bool
    built_per_shape: bool = False


def _two_and_add(attention: Attention, inputs: ExpandedInputs) -> Tensor:
    return attention(inputs.q, inputs.text_k, inputs.text_v) + attention(inputs.q, inputs.ref_k, inputs.ref_v)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def _materialized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The published processor: heads folded into the batch, scores written to memory, softmax, second product."""
    batch, heads, tokens, size = q.shape
    q, k, v = (tensor.reshape(batch * heads, -1, size) for tensor in (q, k, v))
    scores = torch.empty(batch * heads, tokens, k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1).to(q.dtype), v).view(batch, heads, tokens, size)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _flex(compiled: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled(q, k, v)


def _compiled_flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else the shapes of earlier cases use up the recompile limit, and it runs unfused
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _two(name: str, attention: Attention, built_per_shape: bool = False) -> Rival:
    return Rival(f"{name} ×2 + add", functools.partial(_two_and_add, attention), True, built_per_shape)


def rivals() -> list[Rival]:
    """All of them; xformers only where it is installed.

    FlexAttention has one softmax per call and can't express two, so it is called twice like the others.
    """
    found = [
        _two(f"SDPA {name}", functools.partial(_sdpa, backend))
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        )
    ]
    materialized = functools.partial(_two_and_add, _materialized)
    found.append(Rival("published (materialized scores)", materialized, cuda_only=False))
    found.append(_two("FlexAttention", functools.partial(_flex, _compiled_flex()), built_per_shape=True))
    if find_spec("xformers") is not None:
        found.append(_two("xformers", _xformers))
    return found
