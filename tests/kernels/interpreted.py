"""Runs the kernel in Triton's interpreter and prints what came out as JSON: `TRITON_INTERPRET=1 python -m …`.

A process of its own, because the environment decides on the interpreter when the kernel is imported. The interpreter
computes bf16 wrongly (it takes the bits for integers), so bf16 is tested on GPUs alone.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import torch

from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.grca.launch import grca_triton, launch_arguments
from storyadapter.kernels.tiles import GrcaTiles
from tests.kernels.grca_cases import Case, error, inputs, reference

SMALL = GrcaTiles(32, 16, 1, 4, 2, prefetch=False, heads_first=False, max_registers=None)
CASES = {
    "production-like": Case(4, 70, 2, 64, 77, 48, (4, 48)),
    "one query": Case(3, 1, 2, 32, 20, 3, (3,)),
    "one reference": Case(2, 40, 1, 64, 77, 1, (1,)),
    "ragged banks": Case(6, 33, 1, 64, 77, 65, (65, 1, 17), prompts=4),
    "text of 16": Case(2, 33, 2, 32, 16, 40, (40, 9)),
    "text of 128": Case(2, 33, 1, 32, 128, 40, (40, 9)),
    "long text": Case(2, 33, 1, 64, 150, 65, (65, 1)),
    "two chunks": Case(4, 70, 2, 64, 154, 48, (4, 48)),
    "three chunks": Case(3, 33, 2, 64, 231, 40, (40, 9), layout="sliced"),
    "odd strides": Case(3, 33, 2, 64, 3, 100, (100, 41), layout="padded"),
    "sliced": Case(3, 33, 2, 32, 77, 50, (50, 4), layout="sliced"),
    "NaN in the padding": Case(3, 40, 2, 32, 77, 90, (4, 50), poison=True),
    "one prompt": Case(1, 40, 1, 32, 77, 40, prompts=1),
}
VARIANTS = {
    "several tiles": replace(SMALL, tiles=3),
    "prefetch": replace(SMALL, tiles=2, prefetch=True),
    "heads first": replace(SMALL, heads_first=True),
    "wide blocks": replace(SMALL, block_n=64),
}


def _clean(arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (*arguments[:3], arguments[3].nan_to_num(0.0), *arguments[4:])


def _parity(case: Case, dtype: torch.dtype) -> float:
    arguments = inputs(case, dtype)
    return error(grca_triton(*arguments), reference(_clean(arguments)))


def _variant(tiles: GrcaTiles) -> dict[str, float | bool]:
    """Into a poisoned buffer that is larger than the output."""
    arguments = inputs(Case(3, 75, 2, 32, 77, 70, (4, 70, 40), poison=True), torch.float32)
    rows, tokens, heads, size = arguments[0].shape
    buffer = torch.full((rows, tokens + 2, heads, size), float("nan"))
    grid, positional, keywords = launch_arguments(*arguments, buffer[:, 1:-1], tiles)
    grca_kernel[grid](*positional, **keywords)
    untouched = bool(buffer[:, 0].isnan().all() and buffer[:, -1].isnan().all())
    return {"error": error(buffer[:, 1:-1], reference(_clean(arguments))), "untouched": untouched}


def _extreme(dtype: torch.dtype) -> dict[str, float]:
    """Scores of about ±60."""
    arguments = inputs(Case(2, 40, 2, 64, 77, 70, (70, 3), scale=15**0.5), dtype)
    q, text_kv = arguments[0][0].double(), arguments[1][0, 0].double().unflatten(-1, (2, 64))
    largest = float(torch.einsum("shd,khd->hsk", q, text_kv).abs().max() / 8)
    return {"largest": largest, "error": error(grca_triton(*arguments), reference(arguments))}


def _late_key(dtype: torch.dtype) -> dict[str, float]:
    """A streamed key far over the ragged end: the fixed shift overflows in fp16, the running maximum takes over."""
    arguments = inputs(Case(2, 40, 1, 64, 77, 70, (70,)), dtype)
    q, ref_kv = arguments[0], arguments[3]
    ref_kv[0, 0, 20] = 20 * q[1, 3, 0] / q[1, 3, 0].norm()
    scores = q[1, 3, 0].double() @ ref_kv[0, 0].double().T / 8
    return {
        "excess": float(scores[20] - scores[64:].max()),
        "error": error(grca_triton(*arguments), reference(arguments)),
    }


def _zero_values() -> bool:
    """The output is the same bit for bit, whatever zero-valued references lie there."""
    one = inputs(Case(4, 40, 2, 32, 77, 40, (1, 40)), torch.float16)
    two = inputs(Case(4, 40, 2, 32, 77, 90, (90, 3)), torch.float16, seed=1)
    one[3][:, 1] = 0
    two[3][:, 1] = 0
    return torch.equal(grca_triton(*one), grca_triton(*one[:3], two[3], one[4], two[5]))


def _e4m3(dtype: torch.dtype) -> dict[str, float | bool]:
    """A result in e4m3, and one that is far too large for it."""
    arguments = inputs(CASES["production-like"], dtype)
    expected = reference(arguments)
    out, large = (grca_triton(*arguments, torch.tensor([factor])) for factor in (32.0, 1e6))
    assert out.dtype == large.dtype == torch.float8_e4m3fn
    limits = large.float()[expected.abs() > 1e-3]
    return {
        "error": error(out.double() / 32, expected),
        "saturated": bool(
            (limits.abs() == 448).all() and (limits.sign() == expected[expected.abs() > 1e-3].sign()).all()
        ),
    }


def _refusal(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    arguments = [*inputs(Case(4, 8, 2, 32, 20, 10, (4, 10)), torch.float32), torch.ones(1)]
    arguments[index] = change(arguments[index])
    try:
        grca_triton(*arguments)
    except ValueError as error_:
        return str(error_)
    return "accepted"


def main() -> None:
    """Prints one JSON object."""
    found = {
        "parity": {
            str(dtype): {name: _parity(case, dtype) for name, case in CASES.items()}
            for dtype in (torch.float32, torch.float16)
        },
        "variants": {name: _variant(tiles) for name, tiles in VARIANTS.items()},
        "extreme": {str(dtype): _extreme(dtype) for dtype in (torch.float32, torch.float16)},
        "late key": {str(dtype): _late_key(dtype) for dtype in (torch.float32, torch.float16)},
        "zero values": _zero_values(),
        "e4m3": {str(dtype): _e4m3(dtype) for dtype in (torch.float32, torch.float16)},
        "empty": list(grca_triton(*inputs(Case(2, 0, 2, 32, 20, 10), torch.float32)).shape),
        "refusals": {
            "text_row": _refusal(2, lambda tensor: tensor + 3),
            "ref_row": _refusal(4, lambda tensor: tensor - 1),
            "ref_length": _refusal(5, lambda tensor: tensor * 0),
            "factor": _refusal(6, lambda tensor: tensor.half()),
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
