"""Cases of the fp8 products."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.bench.kernels.baselines import Baseline, convolution_baselines, gate, geglu_fp8_baselines
from storyadapter.bench.kernels.case import KernelCase, MatrixCase, normal
from storyadapter.kernels.geglu import interleave_geglu
from storyadapter.kernels.launching import processors
from storyadapter.kernels.products_fp8 import (
    E4M3,
    convolution_fp8_triton,
    geglu_fp8_triton,
    launch_product,
    linear_fp8_triton,
)
from storyadapter.kernels.tiles import ProductTiles


class Fp8Case(KernelCase):
    """A product of e4m3 operands; for baselines they lie in half precision, with the same values."""

    tolerance = 3e-3  # some 14 bits of the tensor cores' sums count, over 17,280 products
    matrix_speed = 2
    element_bytes = 1
    warmup_seconds = 0.15

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """x and weight, and the scale of the output channels, which is 1."""
        x, weight, *others = inputs
        return x.to(E4M3), weight.to(E4M3), x.new_ones(weight.shape[0], dtype=torch.float32), *others


@dataclass(frozen=True)
class ConvolutionFp8Case(Fp8Case):
    """A 3×3 convolution of B square pictures: x [B, C, S, S], weight [N, C, 3, 3], bias [N], residual [B, N, S, S]."""

    B: int
    S: int
    C: int
    N: int

    kernel = "convolution_fp8"
    operator = "convolution_fp8_triton"
    run = staticmethod(functools.partial(convolution_fp8_triton, stride=1))
    columns = {"B": "B", "S": "S", "C": "C", "N": "N"}
    baselines = staticmethod(convolution_baselines)
    least = {"B": 1, "S": 16}

    @property
    def operations(self) -> int:
        return 2 * self.B * self.S**2 * self.N * 9 * self.C

    def bytes_moved(self, element_bytes: int) -> int:
        """x and weight in one byte each, residual and result in half precision."""
        return self.B * self.S**2 * (self.C + 2 * element_bytes * self.N) + 9 * self.C * self.N

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        picture, window = (self.B, self.C, self.S, self.S), (self.N, self.C, 3, 3)
        residual = (self.B, self.N, self.S, self.S)
        x, weight, bias, added = normal(seed, dtype, device, picture, window, (self.N,), residual)
        weight = (weight / (9 * self.C) ** 0.5 * 16).to(E4M3).to(dtype) / 16
        last = torch.channels_last
        return (
            x.to(E4M3).to(dtype).to(memory_format=last),
            weight.to(memory_format=last),
            bias,
            added.to(memory_format=last),
        )

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, residual = inputs
        rows = (weight * 16).permute(0, 2, 3, 1).flatten(1).to(E4M3)
        scale = x.new_full((self.N,), 1 / 16, dtype=torch.float32)
        return x.permute(0, 2, 3, 1).to(E4M3), rows, scale, bias, residual.permute(0, 2, 3, 1)

    def expected(self, *inputs: Tensor) -> Tensor:
        x, weight, bias, residual = (tensor.float() for tensor in inputs)
        out = functional.conv2d(x, weight, bias, padding=1) + residual
        return out.permute(0, 2, 3, 1)

    def launch(self, tiles: ProductTiles, *inputs: Tensor) -> Tensor:
        x, weight, scale, bias, residual = inputs
        out = torch.empty_like(residual)
        launch_product(x, weight, scale, bias, out, tiles, processors(x.device), residual=residual)
        return out


@dataclass(frozen=True)
class LinearFp8Case(Fp8Case, MatrixCase):
    """A linear layer: x [M, K], weight [N, K], bias [N]."""

    kernel = "linear_fp8"
    operator = "linear_fp8_triton"
    run = staticmethod(functools.partial(linear_fp8_triton, residual=None))
    baselines = staticmethod(lambda: [Baseline("F.linear in half precision", functional.linear)])  # by cuBLAS

    @property
    def operations(self) -> int:
        return 2 * self.M * self.K * self.N

    def bytes_moved(self, element_bytes: int) -> int:
        return self.K * (self.M + self.N) + element_bytes * self.M * self.N

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        x, weight, bias = normal(seed, dtype, device, (self.M, self.K), (self.N, self.K), (self.N,))
        return x.to(E4M3).to(dtype), (weight / 4).to(E4M3).to(dtype), bias

    def expected(self, *inputs: Tensor) -> Tensor:
        return functional.linear(*(tensor.float() for tensor in inputs))

    def launch(self, tiles: ProductTiles, *inputs: Tensor) -> Tensor:
        x, weight, scale, bias = inputs
        out = bias.new_empty(self.M, self.N)
        launch_product(x, weight, scale, bias, out, tiles, processors(x.device))
        return out


@dataclass(frozen=True)
class GegluFp8Case(Fp8Case, MatrixCase):
    """A GEGLU layer whose result is e4m3 as well: x [M, K], weight [2·N, K], bias [2·N] as diffusers keeps them."""

    kernel = "geglu_fp8"
    operator = "geglu_fp8_triton"
    run = staticmethod(geglu_fp8_triton)
    tolerance = 3e-2  # rounded to 3 bits
    baselines = staticmethod(geglu_fp8_baselines)

    @property
    def operations(self) -> int:
        return 2 * self.M * self.K * 2 * self.N

    def bytes_moved(self, element_bytes: int) -> int:
        return self.M * self.K + 2 * self.N * self.K + self.M * self.N

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        x, weight, bias = normal(seed, dtype, device, (self.M, self.K), (2 * self.N, self.K), (2 * self.N,))
        return x.to(E4M3).to(dtype), (weight / self.K**0.5 * 16).to(E4M3).to(dtype) / 16, bias / 4

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """With a factor of 16 on the result, as values of e4m3 near 0 are sparse."""
        x, weight, bias = inputs
        mixed, biases = interleave_geglu(weight, bias)
        scale = x.new_full((2 * self.N,), 1 / 16, dtype=torch.float32)
        return x.to(E4M3), (mixed * 16).to(E4M3), scale, biases, x.new_full((1,), 16, dtype=torch.float32)

    def expected(self, *inputs: Tensor) -> Tensor:
        return 16 * gate(functional.linear(*(tensor.float() for tensor in inputs)))

    def launch(self, tiles: ProductTiles, *inputs: Tensor) -> Tensor:
        x, weight, scale, bias, factor = inputs
        out = x.new_empty(self.M, self.N)
        launch_product(x, weight, scale, bias, out, tiles, processors(x.device), factor=factor)
        return out
