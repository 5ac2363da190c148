"""Cases of the kernel benchmark as data, their inputs, their functions' meaning, and what they cost at least."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.bench.kernels.baselines import (
    Baseline,
    gate,
    geglu_baselines,
    grca_baselines,
    group_norm_baselines,
    layer_norm_baselines,
)
from storyadapter.bench.kernels.case import COMPILED_ROWS, KernelCase, MatrixCase, normal
from storyadapter.bench.kernels.fp8_cases import ConvolutionFp8Case, GegluFp8Case, LinearFp8Case
from storyadapter.kernels.geglu import geglu_triton, interleave_geglu, launch_geglu
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.grca.launch import grca_triton, launch_arguments
from storyadapter.kernels.group_norm import group_norm_triton, launch_group_norm
from storyadapter.kernels.launching import processors
from storyadapter.kernels.layer_norm import add_layer_norm_triton, launch_layer_norm
from storyadapter.kernels.tiles import GegluTiles, GrcaTiles, GroupNormTiles, LayerNormTiles
from storyadapter.method.constants import TEXT_TOKENS, TOKENS_PER_IMAGE
from storyadapter.model.grca import grca

# The batch size that summaries speak of.
REPORTED_ROWS: Final = 16
EPS: Final = 1e-5  # of SDXL's norms
GROUPS: Final = 32  # of SDXL's group norms


@dataclass(frozen=True)
class LayerShape:
    """Cross-attention layers of one width at one picture size: S queries, H heads of size D."""

    name: str
    query_tokens: int
    heads: int
    head_size: int = 64


@dataclass(frozen=True)
class GrcaCase(KernelCase):
    """Text and reference attention of a layer: B rows (the first half unconditional), references of N frames, texts of
    M chunks."""

    layer: LayerShape
    rows: int
    frames: int
    chunks: int = 1

    kernel = "grca"
    operator = "grca_triton"
    run = staticmethod(grca_triton)
    columns = {"case": "layer", "B": "B", "N": "N"}

    def as_data(self) -> dict[str, Any]:
        layer = self.layer
        letters = {"S": layer.query_tokens, "H": layer.heads, "D": layer.head_size, "B": self.rows, "N": self.frames}
        name = layer.name if self.chunks == 1 else f"{layer.name}, {self.chunks} chunks"
        return {"layer": name, **letters, "T": self.text_tokens}

    @property
    def text_tokens(self) -> int:
        """T = 77·M."""
        return TEXT_TOKENS * self.chunks

    @property
    def ref_tokens(self) -> int:
        """R = 4·N."""
        return TOKENS_PER_IMAGE * self.frames

    @property
    def exponentials(self) -> int:
        """One for each unmasked score of all rows and heads."""
        unconditional = self.rows // 2
        few, many = self.text_tokens + TOKENS_PER_IMAGE, self.text_tokens + self.ref_tokens
        keys = unconditional * few + (self.rows - unconditional) * many
        return self.layer.query_tokens * self.layer.heads * keys

    @property
    def operations(self) -> int:
        """Of the two matrix products over unmasked keys."""
        return 4 * self.layer.head_size * self.exponentials

    def bytes_moved(self, element_bytes: int) -> int:
        width = self.layer.heads * self.layer.head_size
        queries = 2 * self.rows * self.layer.query_tokens * width
        prompts = self.rows - self.rows // 2 + 1
        keys_values = 2 * width * (prompts * self.text_tokens + TOKENS_PER_IMAGE + self.ref_tokens)
        return element_bytes * (queries + keys_values)

    def smallest(self) -> "GrcaCase":
        return GrcaCase(replace(self.layer, name="compile", query_tokens=COMPILED_ROWS), 2, 1, self.chunks)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """The operator's arguments: P = F + 1 prompts, bank row 0 unconditional (4 tokens), bank row 1 the story."""
        layer, unconditional = self.layer, self.rows // 2
        frames, width = self.rows - unconditional, layer.heads * layer.head_size
        bank, prompts = (2, 2, self.ref_tokens, width), (frames + 1, 2, self.text_tokens, width)
        queries = (self.rows, layer.query_tokens, layer.heads, layer.head_size)
        ref_kv, q, text_kv = normal(seed, dtype, device, bank, queries, prompts)
        ref_kv[0, :, TOKENS_PER_IMAGE:] = 0
        tables = ([0] * unconditional + [*range(1, frames + 1)], [0] * unconditional + [1] * frames)
        text_row, ref_row, ref_length = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (*tables, [TOKENS_PER_IMAGE, self.ref_tokens])
        )
        return q, text_kv, text_row, ref_kv, ref_row, ref_length

    def baseline_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What kernels without row tables and lengths need: q, and k and v [B, H, keys, D] of text and references per
        row; the unconditional references as N copies of 4 tokens."""
        q, text_kv, text_row, ref_kv, ref_row, _ = inputs
        heads = (self.layer.heads, self.layer.head_size)
        bank = ref_kv.clone()
        bank[0] = bank[0, :, :TOKENS_PER_IMAGE].repeat(1, self.frames, 1)
        per_row = (text_kv[text_row.long()].unflatten(-1, heads), bank[ref_row.long()].unflatten(-1, heads))
        return q, *(kv[:, index].contiguous().transpose(1, 2) for kv in per_row for index in (0, 1))

    def expected(self, *inputs: Tensor) -> Tensor:
        q, text_kv, text_row, ref_kv, ref_row, ref_length = inputs
        return grca(q.float(), text_kv.float(), text_row, ref_kv.float(), ref_row, ref_length)

    def launch(self, tiles: GrcaTiles, *inputs: Tensor) -> Tensor:
        q, text_kv, text_row, ref_kv, ref_row, ref_length = inputs
        out = torch.empty_like(q)
        grid, positional, keywords = launch_arguments(q, text_kv, text_row, ref_kv, ref_row, ref_length, out, tiles)
        grca_kernel[grid](*positional, **keywords)
        return out

    def baselines(self) -> list[Baseline]:
        return [item for item in grca_baselines() if self.rows == REPORTED_ROWS or not item.built_per_shape]


@dataclass(frozen=True)
class GegluCase(MatrixCase):
    """A GEGLU layer: x [M, K], weight [2·N, K], bias [2·N] as diffusers keeps them."""

    kernel = "geglu"
    operator = "geglu_triton"
    run = staticmethod(geglu_triton)
    baselines = staticmethod(geglu_baselines)

    @property
    def operations(self) -> int:
        return 2 * self.M * self.K * 2 * self.N

    def bytes_moved(self, element_bytes: int) -> int:
        return element_bytes * (self.M * self.K + 2 * self.N * (self.K + 1) + self.M * self.N)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        x, weight, bias = normal(seed, dtype, device, (self.M, self.K), (2 * self.N, self.K), (2 * self.N,))
        return x, weight / self.K**0.5, bias / 4

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = inputs
        return x, *interleave_geglu(weight, bias)

    def expected(self, *inputs: Tensor) -> Tensor:
        return gate(functional.linear(*(tensor.float() for tensor in inputs)))

    def launch(self, tiles: GegluTiles, *inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
        launch_geglu(x, weight, bias, out, tiles, processors(x.device))
        return out


@dataclass(frozen=True)
class LayerNormCase(KernelCase):
    """A residual addition with its layer norm: x and residual [M, C], weight and bias [C]; gives sum and norm."""

    M: int
    C: int

    kernel = "layer_norm"
    operator = "add_layer_norm_triton"
    run = staticmethod(functools.partial(add_layer_norm_triton, eps=EPS))
    columns = {"M": "M", "C": "C"}
    warmup_seconds = 0.15
    baselines = staticmethod(functools.partial(layer_norm_baselines, EPS))

    def bytes_moved(self, element_bytes: int) -> int:
        """x and residual read once, sum and norm written once."""
        return element_bytes * 4 * self.M * self.C

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        rows = (self.M, self.C)
        x, residual, weight, bias = normal(seed, dtype, device, rows, rows, (self.C,), (self.C,))
        return x, residual, weight / 4 + 1, bias / 4

    def expected(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The norm from the sum that the dtype holds."""
        x, residual, weight, bias = inputs
        total = (x + residual).float()
        return total, functional.layer_norm(total, total.shape[-1:], weight.float(), bias.float(), EPS)

    def launch(self, tiles: LayerNormTiles, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias = inputs
        total, normed = torch.empty_like(x), torch.empty_like(x)
        launch_layer_norm(x, residual, weight, bias, EPS, total, normed, tiles)
        return total, normed


@dataclass(frozen=True)
class GroupNormCase(KernelCase):
    """A group norm of B square pictures with SiLU behind it: x [B, C, S, S], weight and bias [C]."""

    B: int
    S: int
    C: int

    kernel = "group_norm"
    operator = "group_norm_triton"
    run = staticmethod(
        functools.partial(group_norm_triton, groups=GROUPS, eps=EPS, silu=True, factor=None, tokens=False)
    )
    columns = {"B": "B", "S": "S", "C": "C"}
    warmup_seconds = 0.15
    baselines = staticmethod(functools.partial(group_norm_baselines, GROUPS, EPS))
    least = {"B": 1, "S": 16}

    def bytes_moved(self, element_bytes: int) -> int:
        return 2 * element_bytes * self.B * self.S**2 * self.C

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        picture = (self.B, self.C, self.S, self.S)
        x, weight, bias = normal(seed, dtype, device, picture, (self.C,), (self.C,))
        return x.to(memory_format=torch.channels_last), weight / 4 + 1, bias / 4

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs[0].permute(0, 2, 3, 1), *inputs[1:]

    def expected(self, *inputs: Tensor) -> Tensor:
        x, weight, bias = (tensor.float() for tensor in inputs)
        return functional.silu(functional.group_norm(x, GROUPS, weight, bias, EPS)).permute(0, 2, 3, 1)

    def launch(self, tiles: GroupNormTiles, *inputs: Tensor) -> Tensor:
        x, weight, bias = inputs
        out = torch.empty_like(x)
        launch_group_norm(x, weight, bias, GROUPS, EPS, True, None, out, tiles)
        return out


LAYERS_1024: Final = (LayerShape("1024x1024 C=640", 4096, 10), LayerShape("1024x1024 C=1280", 1024, 20))
LAYERS_OTHER: Final = (
    LayerShape("768x768 C=640", 2304, 10),
    LayerShape("768x768 C=1280", 576, 20),
    LayerShape("1344x768 C=640", 4032, 10),
    LayerShape("1344x768 C=1280", 1008, 20),
)
# SDXL at 1024x1024 with B = 16; the GEGLU's N is 4·C, S the side of the latent picture.
GEGLU_CASES: Final = (GegluCase(16 * 4096, 640, 2560), GegluCase(16 * 1024, 1280, 5120))
LAYER_NORM_CASES: Final = (LayerNormCase(16 * 4096, 640), LayerNormCase(16 * 1024, 1280))
CONVOLUTION_FP8_CASES: Final = tuple(
    ConvolutionFp8Case(16, *shape)
    for shape in ((128, 320, 320), (128, 640, 320), (64, 640, 640), (64, 1920, 640), (32, 1280, 1280), (32, 2560, 1280))
)
LINEAR_FP8_CASES: Final = tuple(
    LinearFp8Case(16 * rows, depth, columns)
    for rows, width in ((4096, 640), (1024, 1280))
    for depth, columns in ((width, width), (width, 3 * width), (4 * width, width))
)
GEGLU_FP8_CASES: Final = tuple(GegluFp8Case(case.M, case.K, case.N) for case in GEGLU_CASES)
GROUP_NORM_CASES: Final = tuple(
    GroupNormCase(16, *shape) for shape in ((128, 320), (128, 960), (64, 640), (64, 1280), (32, 1280), (32, 2560))
)
# SDXL's VAE, one frame of 1024x1024
VAE_CONVOLUTION_FP8_CASES: Final = tuple(
    ConvolutionFp8Case(1, *shape)
    for shape in ((1024, 128, 128), (1024, 256, 128), (1024, 256, 256), (512, 256, 256), (512, 512, 256))
    + ((512, 512, 512), (256, 512, 512), (128, 512, 512))
)
VAE_NORM_CASES: Final = tuple(
    GroupNormCase(1, *shape) for shape in ((1024, 128), (1024, 256), (512, 256), (512, 512), (256, 512), (128, 512))
)
SMOKE_CASES: Final[tuple[KernelCase, ...]] = (
    *(GrcaCase(LayerShape("smoke", 32, 1, 32), 4, frames) for frames in (1, 3)),
    GegluCase(16, 32, 48),
    LayerNormCase(4, 48),
    ConvolutionFp8Case(1, 4, 32, 48),
    LinearFp8Case(16, 32, 48),
    GroupNormCase(1, 4, 64),
)  # small enough for a CPU; Triton's interpreter rounds no e4m3 results, so none of GEGLU in fp8
ALL_CASES: Final[tuple[KernelCase, ...]] = (
    *(GrcaCase(layer, rows, n) for layer in LAYERS_1024 for rows in (2, 8, 16, 32) for n in (1, 8, 16, 50, 100)),
    *(GrcaCase(layer, REPORTED_ROWS, n) for layer in LAYERS_OTHER for n in (16, 100)),
    *(GrcaCase(layer, REPORTED_ROWS, 16, chunks=3) for layer in LAYERS_1024),
    *GEGLU_CASES,
    *LAYER_NORM_CASES,
    *CONVOLUTION_FP8_CASES,
    *VAE_CONVOLUTION_FP8_CASES,
    *LINEAR_FP8_CASES,
    *GEGLU_FP8_CASES,
    *GROUP_NORM_CASES,
    *VAE_NORM_CASES,
)
