"""Runs one of the two kernels in Triton's interpreter, prints JSON: `TRITON_INTERPRET=1 python -m … geglu|layer_norm`.

A process of its own, because the environment decides on the interpreter when the kernels are imported. The interpreter
multiplies bf16 matrices wrongly and cuts bf16 off instead of rounding it: its products are tested on GPUs alone.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from storyadapter.kernels.geglu import geglu_triton, gelu, interleave_geglu, launch_geglu
from storyadapter.kernels.layer_norm import add_layer_norm_triton, launch_layer_norm
from storyadapter.kernels.tiles import GegluTiles, LayerNormTiles
from tests.kernels.mlp_cases import error, geglu_inputs, geglu_reference, norm_inputs, norm_reference

GEGLU_CASES = {"one row": (1, 16, 16), "odd": (37, 48, 80), "several blocks": (150, 64, 96), "no rows": (0, 32, 16)}
GEGLU_VARIANTS = {
    "once": GegluTiles(16, 32, 32, 2, 4, 2, persistent=False, descriptors=False),
    "wide": GegluTiles(32, 128, 16, 1, 4, 2, persistent=False, descriptors=False),
    "persistent": GegluTiles(16, 32, 32, 3, 4, 2, persistent=True, descriptors=False),
    "descriptors": GegluTiles(16, 32, 32, 2, 4, 2, persistent=False, descriptors=True),
    "persistent descriptors": GegluTiles(16, 64, 16, 2, 4, 2, persistent=True, descriptors=True),
}
NORM_CASES = {"one row": (1, 16), "odd": (7, 48), "640": (5, 640), "1280": (3, 1280), "largest": (2, 4096)}
NORM_VARIANTS = {f"{rows} rows": LayerNormTiles(rows, 4) for rows in (1, 2, 8)}


@triton.jit
def _gelu_kernel(x, out, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    tl.store(out + offsets, gelu(tl.load(x + offsets)))


def _gelu() -> dict[str, float]:
    x = torch.linspace(-16, 16, 1 << 14)
    out = torch.empty_like(x)
    _gelu_kernel[(1,)](x, out, COUNT=x.numel())
    expected = torch.nn.functional.gelu(x.double())
    difference = (out.double() - expected).abs()
    near, far = x > -5.5, x < -5.5
    extremes = torch.tensor([-1e30, -100.0, 0.0, 1e30] * 4)
    at_extremes = torch.empty_like(extremes)
    _gelu_kernel[(1,)](extremes, at_extremes, COUNT=16)
    return {
        "relative": float((difference[near] / expected[near].abs()).max()),
        "absolute below -5.5": float(difference[far].max()),
        "extremes": at_extremes[:4].tolist(),
    }


def _geglu() -> dict[str, object]:
    parity: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.float16):
        parity[str(dtype)] = {}
        for name, (rows, depth, width) in GEGLU_CASES.items():
            x, weight, bias = geglu_inputs(rows, depth, width, dtype)
            out = geglu_triton(x, *interleave_geglu(weight, bias))
            assert out.dtype == dtype and out.shape == (rows, width)
            if rows:
                parity[str(dtype)][name] = error(out, geglu_reference(x, weight, bias))
    variants = {}
    for name, tiles in GEGLU_VARIANTS.items():
        x, weight, bias = geglu_inputs(75, 80, 112, torch.float32)
        guarded = torch.full((79, 112), float("nan"))
        launch_geglu(x, *interleave_geglu(weight, bias), guarded[2:-2], tiles, programs=3)
        untouched = bool(guarded[:2].isnan().all() and guarded[-2:].isnan().all())
        variants[name] = {"error": error(guarded[2:-2], geglu_reference(x, weight, bias)), "untouched": untouched}
    return {"parity": parity, "variants": variants, "gelu": _gelu()}


def _layer_norm() -> dict[str, object]:
    parity: dict[str, dict[str, object]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parity[str(dtype)] = {}
        for name, (rows, channels) in NORM_CASES.items():
            x, residual, weight, bias = norm_inputs(rows, channels, dtype)
            total, normed = add_layer_norm_triton(x, residual, weight, bias, 1e-5)
            assert total.dtype == normed.dtype == dtype
            parity[str(dtype)][name] = {
                "sum is equal": torch.equal(total, x + residual),
                "sum": error(total, x.double() + residual.double()),
                "normed": error(normed, norm_reference(total, weight, bias, 1e-5)),
            }
    variants = {}
    for name, tiles in NORM_VARIANTS.items():
        x, residual, weight, bias = norm_inputs(5, 656, torch.float32)
        total, normed = torch.full((9, 656), float("nan")), torch.full((9, 656), float("nan"))
        launch_layer_norm(x, residual, weight, bias, 0.5, total[2:-2], normed[2:-2], tiles)
        untouched = all(bool(t[:2].isnan().all() and t[-2:].isnan().all()) for t in (total, normed))
        expected = norm_reference(x + residual, weight, bias, 0.5)
        variants[name] = {"error": error(normed[2:-2], expected), "untouched": untouched}
    empty = [list(t.shape) for t in add_layer_norm_triton(*norm_inputs(0, 32, torch.float32), 1e-5)]
    constant = torch.full((2, 64), 3.0)
    of_constant = add_layer_norm_triton(constant, constant, torch.ones(64), torch.zeros(64), 1e-5)[1]
    return {"parity": parity, "variants": variants, "empty": empty, "of a constant": float(of_constant.abs().max())}


def main() -> None:
    """Prints one JSON object."""
    print(json.dumps({"geglu": _geglu, "layer_norm": _layer_norm}[sys.argv[1]]()))


if __name__ == "__main__":
    main()
