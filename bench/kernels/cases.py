"""Cases of the kernel benchmark as data, their inputs, their functions' meaning, and what they cost at least."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.bench.kernels.baselines import Baseline, gate, geglu_baselines, grca_baselines, layer_norm_baselines
from storyadapter.kernels.geglu import geglu_triton, interleave_geglu, launch_geglu
from storyadapter.kernels.grca.kernel import grca_kernel
from storyadapter.kernels.grca.launch import grca_triton, launch_arguments
from storyadapter.kernels.launching import processors
from storyadapter.kernels.layer_norm import add_layer_norm_triton, launch_layer_norm
from storyadapter.kernels.tiles import GegluTiles, GrcaTiles, LayerNormTiles
from storyadapter.method.constants import TEXT_TOKENS, TOKENS_PER_IMAGE
from storyadapter.model.grca import grca

# The batch size that summaries speak of.
REPORTED_ROWS: Final = 16
EPS: Final = 1e-5  # of SDXL's layer norms
# A compiled kernel serves every number of rows and queries that is a multiple of 16: few will do to compile one.
COMPILED_ROWS: Final = 256


class KernelCase(ABC):
    """One call of a kernel.

    Attributes:
        kernel: what the benchmark calls it.
        operator: name of `run`.
        run: the operator that is measured, with the stored tiles, from `kernel_inputs`.
        columns: of a report, and what `as_data` calls them.
        warmup_seconds: until clocks have settled.
    """

    kernel: ClassVar[str]
    operator: ClassVar[str]
    run: ClassVar[Callable[..., Any]]
    columns: ClassVar[dict[str, str]]
    warmup_seconds: ClassVar[float] = 0.05

    def as_data(self) -> dict[str, Any]:
        """The shape, as JSON data."""
        return asdict(self)  # type: ignore[call-overload]  # the cases are dataclasses

    @property
    def cells(self) -> list[str]:
        """The shape, for a report."""
        return [str(self.as_data()[name]) for name in self.columns.values()]

    @property
    def operations(self) -> int:
        """Floating-point operations of matrix products."""
        return 0

    @property
    def exponentials(self) -> int:
        """That can't be avoided."""
        return 0

    @abstractmethod
    def bytes_moved(self, element_bytes: int) -> int:
        """Each input read once, each output written once."""

    @abstractmethod
    def smallest(self) -> "KernelCase":
        """The least case for which the same kernel is compiled."""

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Random inputs, in the layout of PyTorch's own operators."""

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as the kernel takes them."""
        return inputs

    def baseline_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as baselines take them."""
        return inputs

    @abstractmethod
    def expected(self, *inputs: Tensor) -> Any:
        """The result in fp32: a tensor, or several."""

    @abstractmethod
    def launch(self, tiles: Any, *inputs: Tensor) -> Any:
        """The kernel with other tiles, from `kernel_inputs`."""

    @abstractmethod
    def baselines(self) -> list[Baseline]:
        """What it is compared with."""


@dataclass(frozen=True)
class LayerShape:
    """Cross-attention layers of one width at one picture size: S queries, H heads of size D."""

    name: str
    query_tokens: int
    heads: int
    head_size: int = 64


@dataclass(frozen=True)
class GrcaCase(KernelCase):
    """Text and reference attention of a layer: B rows (the first half unconditional), references of N frames."""

    layer: LayerShape
    rows: int
    frames: int

    kernel: ClassVar[str] = "grca"
    operator: ClassVar[str] = "grca_triton"
    run: ClassVar[Callable[..., Any]] = staticmethod(grca_triton)
    columns: ClassVar[dict[str, str]] = {"case": "layer", "B": "B", "N": "N"}

    def as_data(self) -> dict[str, Any]:
        layer = self.layer
        letters = {"S": layer.query_tokens, "H": layer.heads, "D": layer.head_size, "B": self.rows, "N": self.frames}
        return {"layer": layer.name, **letters}

    @property
    def ref_tokens(self) -> int:
        """R = 4·N."""
        return TOKENS_PER_IMAGE * self.frames

    @property
    def exponentials(self) -> int:
        """One for each unmasked score of all rows and heads."""
        unconditional = self.rows // 2
        few, many = TEXT_TOKENS + TOKENS_PER_IMAGE, TEXT_TOKENS + self.ref_tokens
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
        keys_values = 2 * width * (prompts * TEXT_TOKENS + TOKENS_PER_IMAGE + self.ref_tokens)
        return element_bytes * (queries + keys_values)

    def smallest(self) -> "GrcaCase":
        return GrcaCase(replace(self.layer, name="compile", query_tokens=COMPILED_ROWS), 2, 1)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """The operator's arguments: P = F + 1 prompts, bank row 0 unconditional (4 tokens), bank row 1 the story."""
        layer, unconditional = self.layer, self.rows // 2
        frames, width = self.rows - unconditional, layer.heads * layer.head_size
        bank, prompts = (2, 2, self.ref_tokens, width), (frames + 1, 2, TEXT_TOKENS, width)
        queries = (self.rows, layer.query_tokens, layer.heads, layer.head_size)
        ref_kv, q, text_kv = _normal(seed, dtype, device, bank, queries, prompts)
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
class GegluCase(KernelCase):
    """A GEGLU layer: x [M, K], weight [2·N, K], bias [2·N] as diffusers keeps them."""

    M: int
    K: int
    N: int

    kernel: ClassVar[str] = "geglu"
    operator: ClassVar[str] = "geglu_triton"
    run: ClassVar[Callable[..., Any]] = staticmethod(geglu_triton)
    columns: ClassVar[dict[str, str]] = {"M": "M", "K": "K", "N": "N"}
    warmup_seconds: ClassVar[float] = 0.15  # products at full rate run into the power limit

    @property
    def operations(self) -> int:
        return 2 * self.M * self.K * 2 * self.N

    def bytes_moved(self, element_bytes: int) -> int:
        return element_bytes * (self.M * self.K + 2 * self.N * (self.K + 1) + self.M * self.N)

    def smallest(self) -> "GegluCase":
        return replace(self, M=COMPILED_ROWS)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        x, weight, bias = _normal(seed, dtype, device, (self.M, self.K), (2 * self.N, self.K), (2 * self.N,))
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

    def baselines(self) -> list[Baseline]:
        return geglu_baselines()


@dataclass(frozen=True)
class LayerNormCase(KernelCase):
    """A residual addition with its layer norm: x and residual [M, C], weight and bias [C]; gives sum and norm."""

    M: int
    C: int

    kernel: ClassVar[str] = "layer_norm"
    operator: ClassVar[str] = "add_layer_norm_triton"
    run: ClassVar[Callable[..., Any]] = staticmethod(functools.partial(add_layer_norm_triton, eps=EPS))
    columns: ClassVar[dict[str, str]] = {"M": "M", "C": "C"}
    warmup_seconds: ClassVar[float] = 0.15

    def bytes_moved(self, element_bytes: int) -> int:
        """x and residual read once, sum and norm written once."""
        return element_bytes * 4 * self.M * self.C

    def smallest(self) -> "LayerNormCase":
        return replace(self, M=COMPILED_ROWS)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        rows = (self.M, self.C)
        x, residual, weight, bias = _normal(seed, dtype, device, rows, rows, (self.C,), (self.C,))
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

    def baselines(self) -> list[Baseline]:
        return layer_norm_baselines(EPS)


def _normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


LAYERS_1024: Final = (LayerShape("1024x1024 C=640", 4096, 10), LayerShape("1024x1024 C=1280", 1024, 20))
LAYERS_OTHER: Final = (
    LayerShape("768x768 C=640", 2304, 10),
    LayerShape("768x768 C=1280", 576, 20),
    LayerShape("1344x768 C=640", 4032, 10),
    LayerShape("1344x768 C=1280", 1008, 20),
)
# SDXL at 1024x1024 with B = 16; the GEGLU's N is 4·C.
GEGLU_CASES: Final = (GegluCase(16 * 4096, 640, 2560), GegluCase(16 * 1024, 1280, 5120))
LAYER_NORM_CASES: Final = (LayerNormCase(16 * 4096, 640), LayerNormCase(16 * 1024, 1280))
SMOKE_CASES: Final[tuple[KernelCase, ...]] = (
    *(GrcaCase(LayerShape("smoke", 32, 1, 32), 4, frames) for frames in (1, 3)),
    GegluCase(16, 32, 48),
    LayerNormCase(4, 48),
)  # small enough for a CPU
ALL_CASES: Final[tuple[KernelCase, ...]] = (
    *(GrcaCase(layer, rows, n) for layer in LAYERS_1024 for rows in (2, 8, 16, 32) for n in (1, 8, 16, 50, 100)),
    *(GrcaCase(layer, REPORTED_ROWS, n) for layer in LAYERS_OTHER for n in (16, 100)),
    *GEGLU_CASES,
    *LAYER_NORM_CASES,
)
