"""Packs both MLP kernels by AOTInductor, loads the package, prints its errors at other row counts.

The arguments are where the package goes, and `pointers` or `descriptors`: how the GEGLU loads.
"""

import dataclasses
import sys
from types import SimpleNamespace

import torch
from torch import Tensor

from storyadapter.engine.inductor.target import check_compilers
from storyadapter.kernels import geglu
from storyadapter.kernels.geglu import geglu_triton, interleave_geglu
from storyadapter.kernels.layer_norm import add_layer_norm_triton
from storyadapter.kernels.tiles import GegluTiles
from tests.kernels.mlp_cases import error, geglu_inputs, geglu_reference, norm_inputs, norm_reference

DEPTH, WIDTH = 640, 2560
TILES = GegluTiles(128, 128, 64, 8, 8, 3, persistent=False, descriptors=False)


class Layer(torch.nn.Module):
    """Sum, norm, GEGLU and something after it, over [B, S, 640]."""

    def __init__(self, weights: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "bias", "scale", "shift"), (*weights, *norm), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and the activated product."""
        total, normed = add_layer_norm_triton(x.flatten(0, 1), residual.flatten(0, 1), self.scale, self.shift, 1e-5)
        out = geglu_triton(normed, self.weight, self.bias) + 1
        return total.unflatten(0, x.shape[:2]), out.unflatten(0, x.shape[:2])


def main() -> None:
    """One line a shape: the error of the sum and of the product."""
    check_compilers(torch.device("cuda"))
    tiles = dataclasses.replace(TILES, descriptors=sys.argv[2] == "descriptors", persistent=True)
    geglu.GEGLU = SimpleNamespace(choose=lambda *_: (tiles, False))
    _, weight, bias = geglu_inputs(1, DEPTH, WIDTH, torch.float16, "cuda")
    _, _, scale, shift = norm_inputs(1, DEPTH, torch.float16, "cuda")
    layer = Layer(interleave_geglu(weight, bias), (scale, shift))

    def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        x, residual, _, _ = norm_inputs(batch * tokens, DEPTH, torch.float16, "cuda", seed=batch)
        return x.unflatten(0, (batch, tokens)), residual.unflatten(0, (batch, tokens))

    free = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("S", min=1, max=8192)}
    program = torch.export.export(layer, inputs(4, 256), dynamic_shapes=(free, free))
    run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1]))
    for batch, tokens in ((4, 256), (3, 77), (16, 1008)):
        x, residual = inputs(batch, tokens)
        total, out = run(x, residual)
        normed = norm_reference(x + residual, scale, shift, 1e-5).half().flatten(0, 1)
        expected = geglu_reference(normed, weight, bias) + 1
        print(error(total, x + residual), error(out.flatten(0, 1), expected))


if __name__ == "__main__":
    main()
