"""Text conditioning: prompts become projected keys and values, once per prompt and run."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from storyadapter import method
from storyadapter.contract import text_kv_name
from storyadapter.networks import Networks


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of the two text encoders."""

    first: PreTrainedTokenizerBase
    second: PreTrainedTokenizerBase

    def input_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Two [P, T] int32 tensors on the CPU: padded with each tokenizer's own padding, cut after T tokens."""
        first, second = (
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=method.TEXT_TOKENS,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(torch.int32)
            for tokenizer in (self.first, self.second)
        )
        return first, second

    def words_cut_off(self, prompt: str) -> str:
        """The words at the end of a prompt that lie wholly or partly behind the 77 tokens; empty if all are read."""
        words = prompt.split()
        if self._fits(prompt):
            return ""
        kept = bisect_left(range(len(words)), True, key=lambda count: not self._fits(" ".join(words[: count + 1])))
        return " ".join(words[kept:])

    def _fits(self, text: str) -> bool:
        return all(
            len(tokenizer(text, verbose=False).input_ids) <= method.TEXT_TOKENS
            for tokenizer in (self.first, self.second)
        )


@dataclass(frozen=True)
class BoundText:
    """The text inputs of one micro-batch's UNet calls.

    text_kv: by width C, [L, P, 2, T, C]; text_row: [B] int32; added_embedding: [B, E]; engine's dtype, contiguous.
    """

    text_kv: dict[int, Tensor]
    text_row: Tensor
    added_embedding: Tensor


@dataclass(frozen=True)
class TextConditioning:
    """Projected text of a whole story.

    text_kv: by width C, [L, prompts, 2, T, C]; added_embedding: [prompts, E]; engine's dtype. `prompts` counts the
    negative prompt first, if `guided`, then one prompt per frame.
    """

    text_kv: dict[int, Tensor]
    added_embedding: Tensor
    guided: bool

    def bind(self, frames: range) -> BoundText:
        """The inputs for these frames: unconditional rows first, all of them reading the one negative prompt."""
        device, count = self.added_embedding.device, len(frames)
        first = int(self.guided)
        prompts = [0] * first + [first + frame for frame in frames]
        rows = [0] * (count * first) + [first + i for i in range(count)]
        chosen = torch.tensor(prompts, device=device)
        text_row = torch.tensor(rows, dtype=torch.int32, device=device)
        return BoundText(
            text_kv={channels: kv.index_select(1, chosen) for channels, kv in self.text_kv.items()},
            text_row=text_row,
            added_embedding=self.added_embedding.index_select(0, chosen).index_select(0, text_row),
        )


def encode_text(
    networks: Networks,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    negative_prompt: str | None,
    height: int,
    width: int,
) -> TextConditioning:
    """Encode and project every prompt of a story once.

    Args:
        prompts: final prompts, one per frame.
        negative_prompt: text of the unconditional rows; None computes none (guidance of 1 or less).
        height, width: size of the frames in pixels; original and target size of both rows, without a crop.
    """
    texts = ([] if negative_prompt is None else [negative_prompt]) + list(prompts)
    limit = networks.letters["P"].maximum if networks.letters else len(texts)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=networks.device)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(texts), limit):
        ids, ids_2 = tokenizers.input_ids(texts[start : start + limit])
        inputs = networks.text_encoder({"input_ids": ids.to(networks.device)})
        inputs |= networks.text_encoder_2({"input_ids": ids_2.to(networks.device)})
        inputs["sizes"] = sizes.repeat(len(ids), 1)
        # a backend may reuse its outputs' memory in the next call
        parts.append({name: value.clone() for name, value in networks.text_projection(inputs).items()})
    widths = [width.channels for width in networks.geometry.widths]
    return TextConditioning(
        text_kv={c: torch.cat([part[text_kv_name(c)] for part in parts], dim=1) for c in widths},
        added_embedding=torch.cat([part["added_embedding"] for part in parts]),
        guided=negative_prompt is not None,
    )
