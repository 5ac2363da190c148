"""ControlNets: which kind a folder or file holds, whether it fits the UNet, and its sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from storyadapter.checkpoint.component import Component, convert_controlnet
from storyadapter.checkpoint.ip_adapter import base_model
from storyadapter.checkpoint.outline import Outline, defaults_of
from storyadapter.checkpoint.parts import check_folder
from storyadapter.checkpoint.paths import DIFFUSERS_STEMS, find, read_config, weight_files
from storyadapter.checkpoint.tensor_files import read_headers
from storyadapter.method.control import ControlSettings
from storyadapter.method.errors import CheckpointError, Field, InputError
from storyadapter.model.contract import ControlGeometry, LayerWidth, Residual

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER: Final = r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][+-]?\d+)?"
_STEPS: Final = rf"(?P<start>{_NUMBER})-(?P<end>{_NUMBER})"
_SPEC: Final = re.compile(rf"(?P<path>.*?)(?::(?P<scale>{_NUMBER})(?::{_STEPS})?)?", re.DOTALL)
_KIND: Final = "ControlNetModel"
_EXPECTED: Final = "a ControlNet for SDXL (ControlNetModel), such as thibaud/controlnet-openpose-sdxl-1.0"
# Settings that change what is computed, and what they are in ControlNets for SDXL.
_USUAL: Final[Mapping[str, Any]] = {
    **{"in_channels": 4, "conditioning_channels": 3, "controlnet_conditioning_channel_order": "rgb"},
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")),
    **dict.fromkeys(("global_pool_conditions", "only_cross_attention"), False),
}
# How the names of tensors begin that only a ControlNet has, in both layouts.
_OWN: Final = ("controlnet_cond_embedding.", "input_hint_block.", "control_model.")
# Tensors by which other kinds are known: a part of a name, and what has it.
_OTHERS: Final = (
    ("task_embedding", "a ControlNetUnion, which does several kinds of control"),
    ("control_type_proj", "a ControlNetUnion, which does several kinds of control"),
    ("lora_controlnet", "a Control-LoRA"),
    ("lllite_", "a ControlNet-LLLite"),
    ("adapter.body", "a T2I-Adapter"),
)


@dataclass(frozen=True)
class ControlNetSpec:
    """A ControlNet as typed: a diffusers folder, a file or a hub name, and how it is used."""

    path: Path
    settings: ControlSettings = field(default_factory=ControlSettings)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "P", "P:scale" or "P:scale:start-end"; `str()` gives such a text back.

        Raises:
            InputError: the path is empty, or a number is out of range or written with a comma.
        """
        match = _SPEC.fullmatch(text)
        assert match is not None  # its path takes anything
        numbers = [match[name] for name in ("scale", "start", "end") if match[name]]
        if comma := next((number for number in numbers if "," in number), None):
            found = f" {text!r}: {comma} has a comma"
            raise InputError(Field("controlnet"), found, expected=f"{comma.replace(',', '.')}, written with a point")
        if not match["path"]:
            expected = "PATH, PATH:SCALE or PATH:SCALE:START-END, such as openpose:0.8:0-0.5"
            raise InputError(Field("controlnet"), f" {text!r} has no path", expected=expected)
        scale, start, end = (*map(float, numbers), *(1.0, 0.0, 1.0)[len(numbers) :])
        return cls(Path(match["path"]), ControlSettings(scale, start, end))

    def __str__(self) -> str:
        settings = self.settings
        return f"{self.path}:{settings.scale!r}:{settings.start!r}-{settings.end!r}"


def controlnet_part(typed: Path | str, variant: str | None, unet: Outline, pixels_per_latent: int) -> Component:
    """A ControlNet's files, its kind checked.

    Args:
        typed: a diffusers folder, a single file in diffusers' or the original layout, or a hub name.
        variant: of weights, see `CheckpointPaths`.
        unet: the UNet that it shall fit; a single file has its sizes.
        pixels_per_latent: of the model.

    Raises:
        CheckpointError: it is of another kind or for another model, its blocks aren't the UNet's, or files are missing.
    """
    path, defaults = find("controlnet", typed), defaults_of(_KIND)
    if path.is_dir():
        check_folder("controlnet", path, lambda config: "ControlNet" in str(config.get("_class_name")))
        config, config_file = read_config(path / "config.json"), path / "config.json"
        files = weight_files(path, DIFFUSERS_STEMS, variant)
        _check_class(config_file, config)
    else:
        config = {name: value for name, value in unet.config.items() if name in defaults}
        config_file, files = path, (path,)
    headers: dict[str, Tensor] = {}
    for file in files:
        headers |= read_headers(file) if file.suffix != ".json" else {}
    _check_kind(path, headers, unet.config["cross_attention_dim"])
    _check_config(config_file, defaults | config, unet, pixels_per_latent)
    title = ("the ControlNet given with ", Field("controlnet"))
    return Component(title, config_file, _KIND, config, files, convert_controlnet)


def control_geometry(controlnet: Outline, widths: tuple[LayerWidth, ...]) -> ControlGeometry:
    """The sizes of a ControlNet, whose cross-attention layers have these widths."""
    embedding = controlnet.shapes["time_embedding.linear_2.weight"][0]
    return ControlGeometry(widths, embedding, residuals(controlnet.config))


def residuals(config: Mapping[str, Any]) -> tuple[Residual, ...]:
    """What the encoder of a UNet or a ControlNet gives: its input, each layer, each halving; its middle last."""
    channels = config["block_out_channels"]
    found, shrink = [Residual(channels[0], 1)], 1
    for level, width in enumerate(channels):
        found += [Residual(width, shrink)] * config["layers_per_block"]
        if level + 1 < len(channels):
            shrink *= 2
            found.append(Residual(width, shrink))
    return (*found, Residual(channels[-1], shrink))


def _check_class(path: Path, config: Mapping[str, Any]) -> None:
    name = str(config.get("_class_name"))
    if "Union" in name or "num_control_type" in config:
        raise CheckpointError(f"{path}: a ControlNetUnion, which does several kinds of control", expected=_EXPECTED)
    if name != "ControlNetModel":
        raise CheckpointError(f"{path}: configuration of {config.get('_class_name')}", expected=_EXPECTED)


def _check_kind(path: Path, headers: "Mapping[str, Tensor]", width: int) -> None:
    for part, kind in _OTHERS:
        if any(part in name for name in headers):
            raise CheckpointError(f"{path} is {kind}", expected=_EXPECTED)
    if not any(name.startswith(_OWN) for name in headers):
        first = next(iter(headers), "none")
        raise CheckpointError(f"{path} is no ControlNet: its tensors begin with {first}", expected=_EXPECTED)
    found = next((t.shape[-1] for name, t in headers.items() if name.endswith("attn2.to_k.weight") and t.ndim), width)
    if found != width:
        _refuse_width(path, found, width)


def _refuse_width(path: Path, found: Any, width: int) -> None:
    kind = base_model(found) if isinstance(found, int) else "another base model"
    raise CheckpointError(
        f"{path}: a ControlNet for {kind}, which takes text {found} wide; the UNet takes {width}", expected=_EXPECTED
    )


def _check_config(path: Path, config: Mapping[str, Any], unet: Outline, pixels_per_latent: int) -> None:
    own = unet.config
    if config["cross_attention_dim"] != own["cross_attention_dim"]:
        _refuse_width(path, config["cross_attention_dim"], own["cross_attention_dim"])
    if config["addition_embed_type"] != "text_time":
        found = f"{path}: addition_embed_type is {config['addition_embed_type']!r}"
        raise CheckpointError(found, expected="'text_time', as in every ControlNet for SDXL")
    for name, usual in _USUAL.items():
        if config[name] != usual:
            raise CheckpointError(f"{path}: {name} is {config[name]!r}", expected=f"{usual!r}, as in SDXL's")
    pooled = "projection_class_embeddings_input_dim"
    if config[pooled] != own[pooled]:
        raise CheckpointError(f"{path}: {pooled} is {config[pooled]}", expected=f"{own[pooled]} as in the UNet")
    for name in ("block_out_channels", "layers_per_block"):
        mine, theirs = (tuple(value) if isinstance(value, list) else value for value in (config[name], own[name]))
        if mine != theirs:
            expected = f"{theirs} as in the UNet, to whose blocks it adds"
            raise CheckpointError(f"{path}: {name} is {mine}", expected=expected)
    shrink = 2 ** (len(config["conditioning_embedding_out_channels"] or ()) - 1)
    if shrink != pixels_per_latent:
        found = f"{path}: pictures become 1/{shrink:g} as large (conditioning_embedding_out_channels)"
        raise CheckpointError(found, expected=f"1/{pixels_per_latent}, as large as the latents")
