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

    def input_ids(self, prompts: Sequence[str], chunks: int = 1) -> tuple[Tensor, Tensor]:
        """Two [P·M, 77] int32 tensors on the CPU, the M chunks of a prompt one after the other, cut after the last one:
        75 tokens between a start and an end token each, padded with each tokenizer's own padding."""
        first, second = (
            torch.tensor(tokenizer.padded(prompts, constants.TEXT_TOKENS, chunks), dtype=torch.int32)
            for tokenizer in (self.first, self.second)
        )
        return first, second

    def chunks(self, text: str) -> int:
        """How many chunks a text fills."""
        return max(1, -(-(self.count(text) - 2) // constants.CHUNK_TOKENS))

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
            self._kept[group] = project_texts(self._networks, encode_texts(self._networks, self._tokenizers, group))
        self._kept.move_to_end(group)
        return self._kept[group]


def encode_texts(networks: Networks, tokenizers: Tokenizers, group: TextGroup) -> dict[str, Tensor]:
    """The inputs of `text_projection` for P texts, by name, in memory that a backend may use again.

    Original and target size are the frame's, without a crop, for conditional and unconditional rows alike.
    """
    ids, ids_2 = (upload(ids, networks.device) for ids in tokenizers.input_ids(group.texts, group.chunks))
    size, texts = [group.height, group.width, 0, 0, group.height, group.width], len(group.texts)
    inputs = _encoded(networks, "text_encoder", ids) | _encoded(networks, "text_encoder_2", ids_2)
    if group.chunks > 1:  # hidden states one after the other; the pooled text is the first chunk's
        inputs = {
            name: value.view(texts, group.chunks, -1)[:, 0].contiguous()
            if name == "pooled_text"
            else value.view(texts, -1, value.shape[-1])
            for name, value in inputs.items()
        }
    return inputs | {"sizes": upload(torch.tensor([size] * texts, dtype=torch.float32), networks.device)}


def _encoded(networks: Networks, encoder: str, ids: Tensor) -> dict[str, Tensor]:
    """What a text encoder gives for chunks, in as few calls as the engine takes."""
    most = networks.letters["P"].maximum if networks.letters else len(ids)
    if len(ids) <= most:
        return networks[encoder]({"input_ids": ids})
    calls = list[dict[str, Tensor]]()
    for start in range(0, len(ids), most):
        part = networks[encoder]({"input_ids": ids[start : start + most].contiguous()})
        calls.append({name: value.clone() for name, value in part.items()})
    return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}


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


def text_bytes(geometry: Geometry, dtype: torch.dtype, chunks: int) -> int:
    """What the projected keys and values of prompts take that have so many chunks together: 26 MB each for SDXL in half
    precision."""
    widths = (*geometry.widths, *(width for control in geometry.controls for width in control.widths))
    channels = sum(width.layers * width.channels for width in widths)
    return chunks * 2 * constants.TEXT_TOKENS * channels * dtype.itemsize
