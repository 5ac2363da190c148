"""Text conditioning: prompts become projected keys and values, a micro-batch at a time."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from storyadapter.method import constants
from storyadapter.model.contract import Geometry, text_kv_name
from storyadapter.model.networks import Networks


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
                max_length=constants.TEXT_TOKENS,
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
            len(tokenizer(text, verbose=False).input_ids) <= constants.TEXT_TOKENS
            for tokenizer in (self.first, self.second)
        )


@dataclass(frozen=True, eq=False)
class BoundText:
    """The text inputs of one micro-batch's UNet calls.

    text_kv: by width C, [L, P, 2, T, C]; text_row: [B] int32; added_embedding: [B, E]; engine's dtype, contiguous.
    """

    text_kv: dict[int, Tensor]
    text_row: Tensor
    added_embedding: Tensor


class StoryText:
    """The prompts of a story; encoded and projected per micro-batch, each micro-batch once if that is kept.

    The negative prompt is encoded with every micro-batch, so that a micro-batch's text is the same whether it was kept
    or not, and no call has more prompts than a UNet call. Nothing but the token numbers comes from the host, and they
    do so at once.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizers: Tokenizers,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None,
        height: int,
        width: int,
        keep: bool = True,
    ) -> None:
        """
        Args:
            prompts: final prompts, one per frame.
            negative_prompt: text of the unconditional rows; None computes none (guidance of 1 or less).
            height, width: size of the frames in pixels; original and target size of both rows, without a crop.
            keep: whether the keys and values of all micro-batches stay in memory, see `text_bytes`.
        """
        self._networks = networks
        self._guided = negative_prompt is not None
        self._keep = keep
        self._kept: dict[range, BoundText] = {}
        device = networks.device
        texts = [*([] if negative_prompt is None else [negative_prompt]), *prompts]
        self._ids = tuple(ids.to(device) for ids in tokenizers.input_ids(texts))
        self._sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device)

    def bind(self, frames: range) -> BoundText:
        """The inputs for these frames: unconditional rows first, all of them reading the one negative prompt.

        What isn't kept may lie in memory that the next call of the backend writes again.
        """
        if frames in self._kept:
            return self._kept[frames]
        networks, first = self._networks, int(self._guided)
        chosen = slice(first + frames.start, first + frames.stop)
        ids, ids_2 = (torch.cat((ids[:first], ids[chosen])) for ids in self._ids)
        inputs = networks["text_encoder"]({"input_ids": ids})
        inputs |= networks["text_encoder_2"]({"input_ids": ids_2})
        inputs["sizes"] = self._sizes.repeat(len(ids), 1)
        outputs = networks["text_projection"](inputs)
        row = text_rows(len(frames), self._guided, networks.device)
        kv = {width.channels: outputs[text_kv_name(width.channels)] for width in networks.geometry.widths}
        if self._keep:
            kv = {channels: value.clone() for channels, value in kv.items()}
        bound = BoundText(kv, row, outputs["added_embedding"].index_select(0, row))
        if self._keep:
            self._kept[frames] = bound
        return bound

    def forget(self) -> None:
        """Let go of what is kept, as of micro-batches that won't be drawn again; what is bound next is kept again."""
        self._kept.clear()


def text_rows(frames: int, guided: bool, device: torch.device) -> Tensor:
    """[B] int32: the prompt that each UNet row reads, unconditional rows first; made on the device."""
    options = {"dtype": torch.int32, "device": device}
    own = torch.arange(int(guided), frames + int(guided), **options)
    return torch.cat((torch.zeros(frames, **options), own)) if guided else own


def text_bytes(geometry: Geometry, dtype: torch.dtype, prompts: int) -> int:
    """What the projected keys and values of so many prompts take: 26 MB each for SDXL in half precision."""
    channels = sum(width.layers * width.channels for width in geometry.widths)
    return prompts * 2 * constants.TEXT_TOKENS * channels * dtype.itemsize
