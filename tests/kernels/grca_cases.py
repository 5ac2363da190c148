"""Inputs for the kernel's tests: shapes, layouts and the ways in which inputs can be nasty."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from storyadapter.model.grca import grca

# ‖out - ref‖ / ‖ref‖ against fp32 (fp64 for fp32)
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 5e-6}


@dataclass(frozen=True)
class Case:
    """One call. `lengths`: one per bank row; `layout`: packed, padded (odd strides) or sliced (a wider q)."""

    rows: int
    query_tokens: int
    heads: int
    head_size: int
    text_tokens: int
    ref_tokens: int
    lengths: tuple[int, ...] = field(default=())
    layout: str = "packed"
    prompts: int = 3
    scale: float = 1.0
    poison: bool = False


def _layer_view(generator: torch.Generator, rows: int, tokens: int, width: int, layout: str, device: str) -> Tensor:
    """[rows, 2, tokens, width]: one layer of a packed [3, rows, 2, tokens, width], or a view with odd strides."""
    if layout == "packed":
        return torch.randn((3, rows, 2, tokens, width), generator=generator, device=device)[1]
    return torch.randn((rows, 2, tokens + 1, width + 3), generator=generator, device=device)[:, :, 1:, :width]


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """The operator's six arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = case.lengths or (case.ref_tokens,)
    width = case.heads * case.head_size
    if case.layout == "packed":
        q = torch.randn((case.rows, case.query_tokens, case.heads, case.head_size), generator=generator, device=device)
    elif case.layout == "padded":
        q = torch.randn(
            (case.rows, case.query_tokens, case.heads, case.head_size + 1), generator=generator, device=device
        )[..., : case.head_size]
    else:
        q = torch.randn(
            (case.query_tokens, case.rows, 3 * case.heads, case.head_size), generator=generator, device=device
        )[:, :, case.heads : 2 * case.heads].transpose(0, 1)
    text_kv = _layer_view(generator, case.prompts, case.text_tokens, width, case.layout, device)
    ref_kv = _layer_view(generator, len(lengths), case.ref_tokens, width, case.layout, device)
    q, text_kv, ref_kv = (_cast_keeping_strides(tensor * case.scale, tensor, dtype) for tensor in (q, text_kv, ref_kv))
    if case.poison:
        for row, length in enumerate(lengths):
            ref_kv[row, :, length:] = float("nan")

    def indices(high: int) -> Tensor:
        drawn = torch.randint(0, high, (case.rows,), generator=generator, device=device)
        drawn[: min(high, case.rows)] = torch.arange(min(high, case.rows), device=device)
        return drawn.to(torch.int32)

    length_tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q, text_kv, indices(case.prompts), ref_kv, indices(len(lengths)), length_tensor


def _cast_keeping_strides(values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    storage = torch.zeros(like.untyped_storage().nbytes() // like.element_size(), dtype=dtype, device=like.device)
    view = storage.as_strided(like.shape, like.stride(), like.storage_offset())
    view.copy_(values)
    return view


def reference(arguments: tuple[Tensor, ...]) -> Tensor:
    """The operator's meaning in fp64 on a CPU, fp32 on a GPU (fp64 there for fp32 inputs)."""
    q, text_kv, text_row, ref_kv, ref_row, ref_length = arguments
    wide = torch.float32 if q.device.type == "cuda" and q.dtype != torch.float32 else torch.float64
    return grca(q.to(wide), text_kv.to(wide), text_row, ref_kv.to(wide), ref_row, ref_length)


def error(out: Tensor, expected: Tensor) -> float:
    """‖out - expected‖ / ‖expected‖; NaN anywhere gives NaN, which passes no comparison."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
