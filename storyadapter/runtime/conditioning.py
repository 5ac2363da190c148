"""Text conditioning: prompts become projected keys and values, each once, a group of a story's texts in a call."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from storyadapter.method import constants
from storyadapter.model.contract import Geometry, LayerWidth, control_projection_name, text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.model.tokenizer import TextTokenizer
from storyadapter.runtime.jobs import TextGroup
from storyadapter.runtime.streams import upload

TEXTS_AT_ONCE = 8  # of one call; fewer where the engine takes fewer


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of the two text encoders."""

    first: TextTokenizer
    second: TextTokenizer

    def input_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Two [P, T] int32 tensors on the CPU: padded with each tokenizer's own padding, cut after T tokens."""
        first, second = (
            torch.tensor(tokenizer.padded(prompts, constants.TEXT_TOKENS), dtype=torch.int32)
            for tokenizer in (self.first, self.second)
        )
        return first, second

    def count(self, text: str) -> int:
        """The tokens of a text with those at its ends, by whichever tokenizer makes more."""
        return max(len(tokenizer.ids(text)) for tokenizer in (self.first, self.second))

    def words_cut_off(self, prompt: str) -> str:
        """The words at the end of a prompt that lie wholly or partly behind the 77 tokens; empty if all are read."""
        words, most = prompt.split(), constants.TEXT_TOKENS
        if self.count(prompt) <= most:
            return ""
        known = range(min(len(words), most))  # a word has a token at the least
        kept = bisect_left(known, True, key=lambda count: self.count(" ".join(words[: count + 1])) > most)
        return " ".join(words[kept:])


@dataclass(frozen=True, eq=False)
class TextRow:
    """One prompt as UNet rows read it: `kv` by width C, [L, 2, T, C]; `added_embedding` [E]; the denoiser's dtype; and
    the same as each ControlNet reads it."""

    kv: dict[int, Tensor]
    added_embedding: Tensor
    controls: tuple["TextRow", ...] = ()


class TextCache:
    """Encoded and projected texts, on the device; keeps those that were used last."""

    def __init__(self, networks: Networks, tokenizers: Tokenizers) -> None:
        self._networks = networks
        self._tokenizers = tokenizers
        self._kept: OrderedDict[TextGroup, list[TextRow]] = OrderedDict()

    def take(self, places: Sequence[tuple[TextGroup, int]], keep: int) -> list[TextRow]:
        """The rows of some texts: group and index in it.

        Args:
            keep: how many texts may stay in memory for later calls.
        """
        groups = {group: self._encoded(group) for group, _ in places}
        while len(self._kept) > 0 and sum(map(len, self._kept.values())) > keep:
            self._kept.popitem(last=False)
        return [groups[group][index] for group, index in places]

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()

    def _encoded(self, group: TextGroup) -> list[TextRow]:
        if group not in self._kept:
            self._kept[group] = self._encode(group)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _encode(self, group: TextGroup) -> list[TextRow]:
        return project_texts(self._networks, encode_texts(self._networks, self._tokenizers, group))


def encode_texts(networks: Networks, tokenizers: Tokenizers, group: TextGroup) -> dict[str, Tensor]:
    """The inputs of `text_projection` for P texts, by name, in memory that a backend may use again.

    Original and target size are the frame's, without a crop, for conditional and unconditional rows alike.
    """
    ids, ids_2 = (upload(ids, networks.device) for ids in tokenizers.input_ids(group.texts))
    size = [group.height, group.width, 0, 0, group.height, group.width]
    inputs = networks["text_encoder"]({"input_ids": ids})
    inputs |= networks["text_encoder_2"]({"input_ids": ids_2})
    return inputs | {"sizes": upload(torch.tensor([size] * len(ids), dtype=torch.float32), networks.device)}


def project_texts(networks: Networks, inputs: Mapping[str, Tensor]) -> list[TextRow]:
    """What UNet rows read of each of the P texts, from `encode_texts`; in memory of its own."""
    controls = [
        _projected(networks, control_projection_name(index), control.widths, inputs)
        for index, control in enumerate(networks.geometry.controls)
    ]
    rows = _projected(networks, "text_projection", networks.geometry.widths, inputs)
    return [replace(row, controls=tuple(of_text)) for row, *of_text in zip(rows, *controls, strict=True)]


def _projected(
    networks: Networks, name: str, widths: Sequence[LayerWidth], inputs: Mapping[str, Tensor]
) -> list[TextRow]:
    outputs = networks[name]({tensor.name: inputs[tensor.name] for tensor in networks[name].spec.inputs})
    kv = {width.channels: outputs[text_kv_name(width.channels)].clone() for width in widths}
    added = outputs["added_embedding"].clone()
    rows = range(len(added))
    return [TextRow({channels: value[:, row] for channels, value in kv.items()}, added[row]) for row in rows]


def text_bytes(geometry: Geometry, dtype: torch.dtype, prompts: int) -> int:
    """What the projected keys and values of so many prompts take: 26 MB each for SDXL in half precision."""
    widths = (*geometry.widths, *(width for control in geometry.controls for width in control.widths))
    channels = sum(width.layers * width.channels for width in widths)
    return prompts * 2 * constants.TEXT_TOKENS * channels * dtype.itemsize
