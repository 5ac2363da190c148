"""Runs the fp8 products or the norms in Triton's interpreter, prints JSON: `TRITON_INTERPRET=1 python -m … products`.

A process of its own, because the environment decides on the interpreter when the kernels are imported. The interpreter
cuts e4m3 off instead of rounding it and loses NaN: results in e4m3 are compared more closely on GPUs.
"""

import json
import sys
from dataclasses import replace

import torch
from torch import Tensor

from storyadapter.kernels.group_norm import group_norm_triton, launch_group_norm
from storyadapter.kernels.layer_norm import add_layer_norm_triton
from storyadapter.kernels.products_fp8 import (
    convolution_fp8_triton,
    geglu_fp8_triton,
    launch_product,
    linear_fp8_triton,
)
from storyadapter.kernels.tiles import GroupNormTiles, ProductTiles
from tests.kernels.fp8_cases import (
    convolution_inputs,
    convolution_reference,
    gated,
    group_norm_inputs,
    group_norm_reference,
    linear_inputs,
    linear_reference,
    rows_interleaved,
)
from tests.kernels.mlp_cases import error, norm_inputs, norm_reference

# B, h, w, C, N, stride
CONVOLUTIONS = {
    "odd": (2, 5, 7, 32, 48, 1),
    "stride 2": (2, 6, 8, 32, 48, 2),
    "channels over a block": (1, 9, 3, 48, 16, 1),
    "one pixel": (1, 1, 1, 16, 16, 1),
}
PRODUCT_VARIANTS = {
    "once": ProductTiles(4, 4, 16, 32, 2, 4, 2, persistent=False, descriptors=False),
    "persistent": ProductTiles(2, 8, 32, 32, 2, 4, 2, persistent=True, descriptors=False),
    "descriptors": ProductTiles(4, 4, 16, 32, 2, 4, 2, persistent=False, descriptors=True),
    "persistent descriptors": ProductTiles(2, 8, 32, 64, 2, 4, 2, persistent=True, descriptors=True),
}
NORM_VARIANTS = {
    "narrow": GroupNormTiles(2, 4, 16, 4),
    "wide": GroupNormTiles(16, 2, 128, 4),
    "many chunks": GroupNormTiles(1, 1, 64, 4),
}


def _guarded(like: Tensor) -> Tensor:
    """[rows + 4, …] of NaN for a result like this one at 2 … -2."""
    return torch.full((like.shape[0] + 4, *like.shape[1:]), float("nan"), dtype=torch.float16)


def _written(guarded: Tensor, expected: Tensor) -> dict[str, float | bool]:
    untouched = bool(guarded[:2].isnan().all() and guarded[-2:].isnan().all())
    return {"error": error(guarded[2:-2], expected), "untouched": untouched}


def _products() -> dict[str, object]:
    found: dict[str, object] = {}
    for name, (*shape, stride) in CONVOLUTIONS.items():
        x, weight, scale, shift, residual = convolution_inputs(*shape, stride)
        whole = convolution_fp8_triton(x, weight, scale, shift, residual, stride)
        plain = convolution_fp8_triton(x, weight, scale, shift[0].contiguous(), None, stride)
        found[name] = max(
            error(whole, convolution_reference(x, weight, scale, shift, residual, stride)),
            error(plain, convolution_reference(x, weight, scale, shift[0], None, stride)),
        )
    x, weight, scale, shift, residual = convolution_inputs(*CONVOLUTIONS["odd"])
    bfloat16 = shift[0].bfloat16(), residual.bfloat16()
    out = convolution_fp8_triton(x, weight, scale, *bfloat16, 1)
    assert out.dtype == torch.bfloat16
    found["bfloat16"] = error(out, convolution_reference(x, weight, scale, *bfloat16, 1))
    x, weight, scale, shift, residual = linear_inputs(37, 48, 64)
    found["linear"] = error(
        linear_fp8_triton(x, weight, scale, shift, residual), linear_reference(x, weight, scale, shift, residual)
    )
    mixed = (rows_interleaved(weight.view(torch.uint8)).view(weight.dtype), *map(rows_interleaved, (scale, shift)))
    expected = gated(linear_reference(x, weight, scale, shift, None))
    out = geglu_fp8_triton(x, *mixed, torch.tensor([8.0]))
    assert out.dtype == torch.float8_e4m3fn
    found["geglu"] = error(out.double() / 8, expected)
    found["saturated"] = float(geglu_fp8_triton(x, *mixed, torch.tensor([1e6])).float().abs().max())
    found["no rows"] = list(linear_fp8_triton(x[:0], weight, scale, shift, None).shape)
    variants = {}
    for name, tiles in PRODUCT_VARIANTS.items():
        arguments = convolution_inputs(3, 5, 7, 48, 80, 1)
        expected = convolution_reference(*arguments, 1)
        guarded = _guarded(arguments[-1])
        launch_product(*arguments[:4], guarded[2:-2], tiles, 3, residual=arguments[4])
        x, weight, scale, shift, residual = linear_inputs(37, 48, 80)
        rows = _guarded(residual)
        matrix = replace(tiles, block_h=1, block_w=16)
        launch_product(x, weight, scale, shift, rows[2:-2], matrix, 3, residual=residual)
        variants[name] = {
            "convolution": _written(guarded, expected),
            "linear": _written(rows, linear_reference(x, weight, scale, shift, residual)),
        }
    return {**found, "variants": variants}


def _group_norm() -> dict[str, object]:
    found: dict[str, object] = {}
    for dtype in (torch.float32, torch.float16):
        x, weight, bias = group_norm_inputs(2, 7, 5, 96, dtype)
        for silu in (False, True):
            out = group_norm_triton(x, weight, bias, 32, 1e-5, silu, None, False)
            found[f"{dtype} {silu}"] = error(out, group_norm_reference(x, weight, bias, 32, 1e-5, silu))
    half = tuple(tensor.bfloat16() for tensor in (x, weight, bias))
    of_half = group_norm_triton(*half, 32, 1e-5, True, torch.tensor([64.0]), False)
    assert of_half.dtype == torch.float8_e4m3fn
    found["e4m3 of bfloat16"] = error(of_half.double() / 64, group_norm_reference(*half, 32, 1e-5, True))
    tokens = group_norm_triton(x, weight, bias, 32, 1e-5, True, torch.tensor([64.0]), True)
    assert tokens.dtype == torch.float8_e4m3fn and tokens.shape == (70, 96)
    expected = group_norm_reference(x, weight, bias, 32, 1e-5, True).view(70, 96)
    found["e4m3"] = error(tokens.double() / 64, expected)
    many = group_norm_triton(x, weight, bias, 32, 1e-5, True, torch.tensor([1e6]), True)
    found["saturated"] = float(many.float().abs().max())
    variants = {}
    for name, tiles in NORM_VARIANTS.items():
        guarded = _guarded(x)
        launch_group_norm(x, weight, bias, 16, 0.5, False, None, guarded[2:-2], tiles)
        variants[name] = _written(guarded, group_norm_reference(x, weight, bias, 16, 0.5, False))
    return {**found, "variants": variants}


def _layer_norm() -> dict[str, float]:
    x, residual, weight, bias = norm_inputs(7, 48, torch.float16)
    total, normed = add_layer_norm_triton(x, residual, weight * 16, bias * 16, 1e-5, True)
    assert normed.dtype == torch.float8_e4m3fn
    saturated = add_layer_norm_triton(x, residual, weight * 4096, bias, 1e-5, True)[1]
    return {
        "e4m3": error(normed.double() / 16, norm_reference(total, weight, bias, 1e-5)),
        "saturated": float(saturated.float().abs().max()),
    }


KERNELS = {"products": _products, "group_norm": _group_norm, "layer_norm": _layer_norm}


def main() -> None:
    """Prints one JSON object, with what is named."""
    print(json.dumps({name: KERNELS[name]() for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
