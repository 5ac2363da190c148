"""The layers that the tiles of the GEGLU and the layer norm are chosen for: shapes, inputs, references and rivals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.bench.mlp_candidates import GEGLU_TILES, LAYER_NORM_TILES
from storyadapter.kernels.geglu.launch import interleave_geglu, launch_geglu
from storyadapter.kernels.launching import processors
from storyadapter.kernels.layer_norm.launch import launch_layer_norm
from storyadapter.kernels.tiles import GegluTiles, LayerNormTiles

DTYPE: Final = torch.float16
EPS: Final = 1e-5  # of SDXL's layer norms


@dataclass(frozen=True)
class Rival:
    """Another way to compute a case, or a part of it, from the case's inputs, and what it has to give, in fp32."""

    name: str
    run: Callable[..., Any]
    expected: Callable[..., Any]


@dataclass(frozen=True)
class GegluCase:
    """One call of a GEGLU layer: x [M, K], weight [2·N, K], bias [2·N] as diffusers keeps them.

    Attributes:
        rows: M.
        depth: K.
        width: N.
    """

    rows: int
    depth: int
    width: int

    operator: ClassVar[str] = "geglu"
    candidates: ClassVar[tuple[GegluTiles, ...]] = GEGLU_TILES

    @property
    def label(self) -> str:
        """The shape, for a report."""
        return f"M={self.rows} K={self.depth} N={self.width}"

    @property
    def key(self) -> str:
        """Under which `tiles.json` keeps the tiles; M isn't in it."""
        return f"{self.operator}/{8 * DTYPE.itemsize}-bit/K={self.depth}"

    @property
    def operations(self) -> int:
        """Of the matrix product; the activation isn't counted."""
        return 2 * self.rows * self.depth * 2 * self.width

    @property
    def bytes_moved(self) -> int:
        """Each input read once, the output written once."""
        elements = self.rows * self.depth + 2 * self.width * (self.depth + 1) + self.rows * self.width
        return DTYPE.itemsize * elements

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """x, weight and bias."""
        generator = torch.Generator(device).manual_seed(seed)
        x = _random(self.rows, self.depth, generator=generator)
        weight = _random(2 * self.width, self.depth, generator=generator) / self.depth**0.5
        return x, weight, _random(2 * self.width, generator=generator) / 4

    def kernel_inputs(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """The inputs as the kernel takes them."""
        return x, *interleave_geglu(weight, bias)

    def launch(self, tiles: GegluTiles, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[M, N] by the kernel."""
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        launch_geglu(x, weight, bias, out, tiles, processors(x.device))
        return out

    @staticmethod
    def expected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[M, N] in fp32."""
        return gate(linear(x.float(), weight.float(), bias.float()))

    def rivals(self) -> tuple[Rival, ...]:
        """The product alone, a bound that leaves the activation out, and the way to beat, last."""
        compiled_gate = torch.compile(gate, dynamic=False)

        def linear_and_gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return compiled_gate(linear(x, weight, bias))

        return (
            Rival("F.linear alone", linear, lambda *inputs: linear(*(tensor.float() for tensor in inputs))),
            Rival("F.linear + compiled elementwise GEGLU", linear_and_gate, self.expected),
        )


@dataclass(frozen=True)
class LayerNormCase:
    """One residual addition with its layer norm: x and residual [M, C], weight and bias [C].

    Attributes:
        rows: M.
        channels: C.
    """

    rows: int
    channels: int

    operator: ClassVar[str] = "layer_norm"
    candidates: ClassVar[tuple[LayerNormTiles, ...]] = LAYER_NORM_TILES

    @property
    def label(self) -> str:
        """The shape, for a report."""
        return f"M={self.rows} C={self.channels}"

    @property
    def key(self) -> str:
        """Under which `tiles.json` keeps the tiles; M isn't in it."""
        return f"{self.operator}/{8 * DTYPE.itemsize}-bit/C={self.channels}"

    @property
    def bytes_moved(self) -> int:
        """x and residual read once, sum and norm written once."""
        return DTYPE.itemsize * 4 * self.rows * self.channels

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """x, residual, weight and bias."""
        generator = torch.Generator(device).manual_seed(seed)
        x, residual = (_random(self.rows, self.channels, generator=generator) for _ in range(2))
        weight, bias = (_random(self.channels, generator=generator) / 4 for _ in range(2))
        return x, residual, weight + 1, bias

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as the kernel takes them: as they are."""
        return inputs

    def launch(
        self, tiles: LayerNormTiles, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum and norm, both [M, C], by the kernel."""
        total, normed = torch.empty_like(x), torch.empty_like(x)
        launch_layer_norm(x, residual, weight, bias, EPS, total, normed, tiles)
        return total, normed

    @staticmethod
    def expected(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and norm in fp32, the norm from the sum that fp16 holds."""
        total = (x + residual).float()
        return total, functional.layer_norm(total, total.shape[-1:], weight.float(), bias.float(), EPS)

    def rivals(self) -> tuple[Rival, ...]:
        """The way to beat."""
        return (Rival("eager add + layer_norm", add_layer_norm, self.expected),)


Case = GegluCase | LayerNormCase

# SDXL at 1024x1024 with B = 16: 4096 tokens of 640 channels and 1024 tokens of 1280; the GEGLU's N is 4·C.
CASES: Final[tuple[Case, ...]] = (
    GegluCase(16 * 4096, 640, 2560),
    GegluCase(16 * 1024, 1280, 5120),
    LayerNormCase(16 * 4096, 640),
    LayerNormCase(16 * 1024, 1280),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[M, 2·N] from [M, K], [2·N, K] and [2·N]."""
    return functional.linear(x, weight, bias)


def gate(product: Tensor) -> Tensor:
    """value · gelu(gate): [M, N] from [M, 2·N], all values before all gates."""
    value, gates = product.chunk(2, -1)
    return value * functional.gelu(gates)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and norm, both [M, C], as eager PyTorch computes them: two kernels."""
    total = x + residual
    return total, functional.layer_norm(total, total.shape[-1:], weight, bias, EPS)


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE)
