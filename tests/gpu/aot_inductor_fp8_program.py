"""Packs the fp8 products and both norms that feed them by AOTInductor, prints the package's errors at other shapes.

The argument is where the package goes.
"""

import sys

import torch
from torch import Tensor, nn

from storyadapter.engine.inductor.target import check_compilers
from storyadapter.kernels.group_norm import group_norm_triton
from storyadapter.kernels.layer_norm import add_layer_norm_triton
from storyadapter.kernels.products_fp8 import E4M3, convolution_fp8_triton, geglu_fp8_triton, linear_fp8_triton
from tests.kernels.fp8_cases import convolution_inputs, linear_inputs
from tests.kernels.mlp_cases import error

CHANNELS, COLUMNS, FACTOR = 320, 640, 40.0


class Layer(nn.Module):
    """Group norm, three convolutions, layer norm, GEGLU and a linear layer, over [B, 320, h, w]."""

    def __init__(self) -> None:
        super().__init__()

        def keep(name: str, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
            for part, tensor in (("weight", weight), ("scale", scale / FACTOR), ("shift", shift)):
                self.register_buffer(f"{name}_{part}", tensor)

        for name, width in (("first", CHANNELS), ("second", COLUMNS)):
            _, weight, scale, shift, _ = convolution_inputs(1, 2, 2, width, COLUMNS, 1, "cuda")
            keep(name, weight, scale, shift[0].contiguous())
        for name, columns in (("geglu", 2 * COLUMNS), ("linear", COLUMNS)):
            keep(name, *linear_inputs(1, COLUMNS, columns, "cuda")[1:4])
        for name, count in (("group", CHANNELS), ("layer", COLUMNS)):
            self.register_buffer(f"{name}_weight", torch.full((count,), 1.5, device="cuda", dtype=torch.float16))
            self.register_buffer(f"{name}_bias", torch.full((count,), 0.25, device="cuda", dtype=torch.float16))
        self.register_buffer("factor", torch.full((1,), FACTOR, device="cuda"))

    def forward(self, pictures: Tensor, shift: Tensor) -> Tensor:
        """pictures channels-last, shift [B, 640]; gives [B, 640, h / 2, w / 2]."""
        last = pictures.permute(0, 2, 3, 1)
        out = group_norm_triton(last, self.group_weight, self.group_bias, 32, 1e-5, True, self.factor, False)
        out = convolution_fp8_triton(out, self.first_weight, self.first_scale, self.first_shift + shift, None, 1)
        second = (self.second_weight, self.second_scale, self.second_shift)
        out = convolution_fp8_triton(self._rounded(out), *second, None, 2)
        out = convolution_fp8_triton(self._rounded(out), *second, out, 1)
        rows = out.reshape(-1, COLUMNS)
        weight, bias = (tensor * 16 for tensor in (self.layer_weight, self.layer_bias))
        total, normed = add_layer_norm_triton(rows, rows, weight, bias, 1e-5, True)
        hidden = geglu_fp8_triton(normed, self.geglu_weight, self.geglu_scale, self.geglu_shift, self.factor)
        result = linear_fp8_triton(hidden, self.linear_weight, self.linear_scale, self.linear_shift, total)
        return result.view(out.shape).permute(0, 3, 1, 2) * 2

    def _rounded(self, x: Tensor) -> Tensor:
        return (x.float() * self.factor).clamp(-448, 448).to(E4M3)


def main() -> None:
    """One line a shape: the error against the same operators one after the other."""
    check_compilers(torch.device("cuda"))
    layer = Layer()

    def inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(batch)
        pictures = torch.randn((batch, CHANNELS, height, width), generator=generator, device="cuda").half()
        shift = torch.randn((batch, COLUMNS), generator=generator, device="cuda").half()
        return pictures.to(memory_format=torch.channels_last), shift

    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("B", "half_h", "half_w"))
    free = ({0: batch, 2: 2 * height, 3: 2 * width}, {0: batch})
    with torch.no_grad():
        program = torch.export.export(layer, inputs(4, 48, 32), dynamic_shapes=free, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
        run = torch._inductor.aoti_load_package(path, run_single_threaded=True)
        for shape in ((4, 48, 32), (3, 34, 38), (16, 128, 128)):
            print(error(run(*inputs(*shape)), layer(*inputs(*shape))))


if __name__ == "__main__":
    main()
