"""The names in LoRA files. Prefix, layer and suffix are read apart, so that all conventions of one go with all of the
others: a layer is looked up among the spellings that the model's own layers have.

Prefixes: kohya's `lora_unet_`, `lora_te1_`, `lora_te2_`; diffusers' `unet.`, `text_encoder.`, `text_encoder_2.`;
OneTrainer's `unet.`, `clip_l.`, `clip_g.`; `diffusion_model.`; `lycoris_`; peft's `base_model.model.`; none.
Layers: as in diffusers or as in the original single file, with dots or with underscores; diffusers' old attention
processors. Suffixes: `_PARTS`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from storyadapter.checkpoint.outline import Outline

NETWORKS: Final = ("unet", "text_encoder", "text_encoder_2")
PEFT_PREFIX: Final = "base_model.model."
_UNET, _TEXT, _TEXT_2 = ((name,) for name in NETWORKS)
_PREFIXES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    *(("lora_unet_", _UNET), ("lora_te1_", _TEXT), ("lora_te_", _TEXT), ("lora_te2_", _TEXT_2)),
    *(("unet.", _UNET), ("text_encoder.", _TEXT), ("text_encoder_2.", _TEXT_2)),
    *(("clip_l.", _TEXT), ("clip_g.", _TEXT_2)),
    *(("model.diffusion_model.", _UNET), ("diffusion_model.", _UNET)),
    *(("lycoris_", NETWORKS), ("", NETWORKS)),
)
_PARTS: Final = {
    "down": r"\.lora_down\.weight|\.lora_A(\.\w+)?\.weight|\.lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|_lora\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(\.\w+)?\.weight|\.lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    r"|_lora\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    # LyCORIS calls the differences of a norm's weight and bias by names of their own
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
}
_PART: Final = re.compile("(?:" + "|".join(f"(?P<{part}>{suffix})" for part, suffix in _PARTS.items()) + r")\Z")
# What else is trained in such files and computes something else, by how its names end.
_OTHER_KINDS: Final = {
    "a DoRA": r"\.dora_scale|\.lora_magnitude_vector(\.\w+)*",
    "a LoHa": r"\.hada_\w+",
    "a LoKr": r"\.lokr_\w+",
    "a GLoRA": r"\.[ab][12]\.weight",
    "an IA3": r"\.on_input|\.ia3_\w+(\.\w+)*",
    "an OFT": r"\.oft_\w+(\.\w+)*",
    "a BOFT": r"\.boft_\w+(\.\w+)*",
    "a VeRA": r"\.vera_\w+(\.\w+)*",
    "a LoRA of token embeddings": r"\.lora_embedding_[AB](\.\w+)*",
}
_OTHER_KIND: Final = {kind: re.compile(f"(?:{suffix})\\Z") for kind, suffix in _OTHER_KINDS.items()}
_EMBEDDING: Final = "bundle_emb."  # of LyCORIS and OneTrainer

_RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS: Final = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK: Final = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)|(mid_block)\.(\w+)\.(\d+)")


def other_kind(name: str) -> str | None:
    """What a name belongs to that is no plain LoRA, in words; None if it isn't known to be anything else."""
    if name.startswith(_EMBEDDING):
        return "a LoRA with a textual inversion embedding"
    return next((kind for kind, suffix in _OTHER_KIND.items() if suffix.search(name)), None)


@dataclass(frozen=True)
class LoraName:
    """What a tensor's name means."""

    network: str
    module: str  # within the network
    part: str  # "down", "up", "mid", "alpha", "diff" or "diff_b"


@dataclass(frozen=True)
class Unknown:
    """A name that means nothing here; `network` where its prefix says so much."""

    network: str | None
    layer: str


@dataclass(frozen=True)
class Ambiguous:
    """A name without a prefix, of a layer that several networks have."""

    networks: tuple[str, ...]


class LoraNames:
    """Reads names, given what the networks of a model consist of."""

    def __init__(self, networks: Mapping[str, Outline]) -> None:
        self._modules: dict[str, dict[str, str]] = {name: {} for name in NETWORKS}
        for name, known in self._modules.items():
            weights = (tensor for tensor in networks[name].shapes if tensor.endswith(".weight"))
            modules = [tensor.removesuffix(".weight") for tensor in weights]
            spell = _unet_spellings(modules) if name == "unet" else _text_spellings(modules)
            for module, spelling in spell:
                known[spelling] = known[spelling.replace(".", "_")] = module

    def read(self, name: str) -> LoraName | Unknown | Ambiguous | None:
        """What a name means; None if it ends as no part of a LoRA does."""
        part = _PART.search(name)
        if part is None:
            return None
        layer, named = name[: part.start()], next(part for part, text in part.groupdict().items() if text)
        unknown = None
        for prefix, networks in _PREFIXES:
            if not layer.startswith(prefix):
                continue
            rest = layer[len(prefix) :].removeprefix(PEFT_PREFIX)
            found = [LoraName(n, module, named) for n in networks if (module := self._modules[n].get(rest))]
            if len(found) > 1:
                return Ambiguous(tuple(each.network for each in found))
            if found:
                return found[0]
            unknown = unknown or Unknown(networks[0] if len(networks) == 1 else None, rest)
        return unknown


def _unet_spellings(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a UNet's layer and a spelling of it; the original numbers all blocks of one side through."""
    blocks = [match for match in map(_BLOCK.match, modules) if match]
    per_block = 2 + max(int(m[4]) for m in blocks if (m[1], m[3]) == ("down_blocks", "resnets"))  # one samples
    attends = {m[2] for m in blocks if (m[1], m[3]) == ("up_blocks", "attentions")}

    def original(module: str) -> str:
        block = _BLOCK.match(module)
        if block is None:
            return _UNET_ENDS.get(module, module)
        side, number, part, index, middle, middle_part, middle_index = block.groups()
        rest = module[block.end() :]
        if "resnets" in (part, middle_part):
            rest = "." + _RESNET[rest[1:]]
        if middle:
            return f"middle_block.{1 if middle_part == 'attentions' else 2 * int(middle_index)}{rest}"
        if part == "downsamplers":
            return f"input_blocks.{(int(number) + 1) * per_block}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{(int(number) + 1) * per_block - 1}.{2 if number in attends else 1}.conv"
        place = int(number) * per_block + int(index)
        inner = "1" if part == "attentions" else "0"
        return f"{f'input_blocks.{1 + place}' if side == 'down_blocks' else f'output_blocks.{place}'}.{inner}{rest}"

    for module in modules:
        for spelling in {module, original(module)}:
            yield module, spelling
            old = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", spelling)
            if old != spelling:
                yield module, old


def _text_spellings(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a text encoder's layer and a spelling of it; what begins with "text_model." changed in time."""
    for module in modules:
        bare = module.removeprefix("text_model.")
        for spelling in (bare, f"text_model.{bare}"):
            yield module, spelling
            yield module, re.sub(r"(?<=\.self_attn)\.(q|k|v|out)_proj$", r".to_\1", spelling)
