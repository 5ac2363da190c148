"""Cases of the kernel benchmark as data, their inputs, and what they cost at least."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter.method.constants import TEXT_TOKENS, TOKENS_PER_IMAGE

HEAD_SIZE = 64


@dataclass(frozen=True)
class LayerShape:
    """Cross-attention layers of one width at one picture size: S queries, H heads of size D."""

    name: str
    query_tokens: int
    heads: int
    head_size: int = HEAD_SIZE


LAYERS_1024 = (LayerShape("1024x1024 C=640", 4096, 10), LayerShape("1024x1024 C=1280", 1024, 20))
LAYERS_OTHER = (
    LayerShape("768x768 C=640", 2304, 10),
    LayerShape("768x768 C=1280", 576, 20),
    LayerShape("1344x768 C=640", 4032, 10),
    LayerShape("1344x768 C=1280", 1008, 20),
)
LAYERS_SMOKE = (LayerShape("smoke", 32, 1, 32),)
BATCHES = (2, 8, 16, 32)
FRAMES = (1, 8, 16, 50, 100)


@dataclass(frozen=True)
class KernelCase:
    """One call: a layer's shape, B rows (the first half unconditional), references of N frames."""

    layer: LayerShape
    rows: int
    frames: int

    @property
    def ref_tokens(self) -> int:
        """R = 4·N."""
        return TOKENS_PER_IMAGE * self.frames

    @property
    def row_keys(self) -> list[int]:
        """Unmasked keys of each row, text and reference."""
        unconditional = self.rows // 2
        few, many = TEXT_TOKENS + TOKENS_PER_IMAGE, TEXT_TOKENS + self.ref_tokens
        return [few] * unconditional + [many] * (self.rows - unconditional)

    @property
    def scores(self) -> int:
        """Unmasked scores of all rows and heads: one exponential each."""
        return self.layer.query_tokens * self.layer.heads * sum(self.row_keys)

    @property
    def operations(self) -> int:
        """Floating-point operations of the two matrix products over unmasked keys."""
        return 4 * self.layer.head_size * self.scores

    def bytes_moved(self, element_bytes: int) -> int:
        """Each input read once, the output written once."""
        width = self.layer.heads * self.layer.head_size
        queries = 2 * self.rows * self.layer.query_tokens * width
        prompts = self.rows - self.rows // 2 + 1
        keys_values = 2 * width * (prompts * TEXT_TOKENS + TOKENS_PER_IMAGE + self.ref_tokens)
        return element_bytes * (queries + keys_values)


@dataclass(frozen=True)
class GrcaInputs:
    """Arguments of the operator, in its order and with its shapes."""

    q: Tensor
    text_kv: Tensor
    text_row: Tensor
    ref_kv: Tensor
    ref_row: Tensor
    ref_length: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        """In the operator's order."""
        return self.q, self.text_kv, self.text_row, self.ref_kv, self.ref_row, self.ref_length

    def to(self, dtype: torch.dtype) -> "GrcaInputs":
        """The floating-point tensors in another type."""
        q, text_kv, ref_kv = (tensor.to(dtype) for tensor in (self.q, self.text_kv, self.ref_kv))
        return GrcaInputs(q, text_kv, self.text_row, ref_kv, self.ref_row, self.ref_length)


@dataclass(frozen=True)
class ExpandedInputs:
    """The same call without masks and row tables: q [B, H, S, D] (a view), k and v [B, H, keys, D] per row."""

    q: Tensor
    text_k: Tensor
    text_v: Tensor
    ref_k: Tensor
    ref_v: Tensor


def make_inputs(case: KernelCase, dtype: torch.dtype, device: torch.device, seed: int) -> GrcaInputs:
    """Random inputs of a case: P = F + 1 prompts, bank row 0 unconditional (4 tokens), bank row 1 the story."""
    generator = torch.Generator(device).manual_seed(seed)
    layer, unconditional = case.layer, case.rows // 2
    frames = case.rows - unconditional
    width = layer.heads * layer.head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    ref_kv = normal(2, 2, case.ref_tokens, width)
    ref_kv[0, :, TOKENS_PER_IMAGE:] = 0
    integers = torch.int32
    return GrcaInputs(
        q=normal(case.rows, layer.query_tokens, layer.heads, layer.head_size),
        text_kv=normal(frames + 1, 2, TEXT_TOKENS, width),
        text_row=torch.tensor([0] * unconditional + [*range(1, frames + 1)], dtype=integers, device=device),
        ref_kv=ref_kv,
        ref_row=torch.tensor([0] * unconditional + [1] * frames, dtype=integers, device=device),
        ref_length=torch.tensor([TOKENS_PER_IMAGE, case.ref_tokens], dtype=integers, device=device),
    )


def expand(case: KernelCase, inputs: GrcaInputs) -> ExpandedInputs:
    """What kernels without row tables and lengths need; the unconditional references as N copies of 4 tokens."""
    heads = (case.layer.heads, case.layer.head_size)
    text = inputs.text_kv[inputs.text_row.long()].unflatten(-1, heads)
    bank = inputs.ref_kv.clone()
    bank[0] = bank[0, :, :TOKENS_PER_IMAGE].repeat(1, case.frames, 1)
    refs = bank[inputs.ref_row.long()].unflatten(-1, heads)
    text_k, text_v, ref_k, ref_v = (
        kv[:, index].contiguous().transpose(1, 2) for kv in (text, refs) for index in (0, 1)
    )
    return ExpandedInputs(inputs.q.transpose(1, 2), text_k, text_v, ref_k, ref_v)


def all_cases() -> Iterator[KernelCase]:
    """The published table: both layer widths at 1024×1024 over B and N, the other sizes at B = 16."""
    for layer in LAYERS_1024:
        for rows in BATCHES:
            for frames in FRAMES:
                yield KernelCase(layer, rows, frames)
    for layer in LAYERS_OTHER:
        for frames in (16, 100):
            yield KernelCase(layer, 16, frames)


def smoke_cases() -> Iterator[KernelCase]:
    """Small enough for a CPU."""
    for frames in (1, 3):
        yield KernelCase(LAYERS_SMOKE[0], 4, frames)
