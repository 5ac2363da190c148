"""LoRAs: does a file fit the model, and fusing it into the weights with diffusers and peft."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint.paths import LoraSpec
from storyadapter.checkpoint.tensor_files import first_line, read_headers, read_metadata, read_tensors
from storyadapter.method.errors import CheckpointError, Field

if TYPE_CHECKING:
    from torch import Tensor, nn

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_OLD_TEXT_NAME = re.compile(r"(?<=\.self_attn)\.to_(q|k|v|out)_lora\.")
_OTHER_KINDS = {"dora_scale": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa", "lora_magnitude_vector": "a DoRA"}


def lora_file(path: Path) -> Path:
    """The file itself, or the one in a folder that diffusers wrote. Raises CheckpointError: the folder has none."""
    if not path.is_dir():
        return path
    for name in _FILE_NAMES:
        if (path / name).exists():
            return path / name
    raise CheckpointError(Field("lora"), f" {path} has no {_FILE_NAMES[0]}", advice="give the file itself")


def check_lora(path: Path, networks: Mapping[str, Any]) -> None:
    """Compare names and shapes of a LoRA with the empty networks it is meant for.

    Raises:
        CheckpointError: it is corrupt, of another kind (DoRA, LoKr, LoHa), or for another model.
    """
    headers = read_headers(path)
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in name for name in headers):
            raise CheckpointError(f"{path} is {kind}, not a plain LoRA", expected="lora_down and lora_up matrices only")
    _adapter_metadata(path)
    state = _diffusers_names(path, headers, networks["unet"].config)
    unknown = [name for name in state if name.split(".")[0] not in NETWORKS]
    if unknown or not state:
        raise CheckpointError(
            f"{path} is no LoRA for SDXL: expected matrices for its UNet and text encoders, found "
            f"{unknown[0] if unknown else 'no tensors'}"
        )
    for name in NETWORKS:
        _check_parts(path, name, _peft_names(name, state), networks[name])


def fuse_loras(name: str, network: "nn.Module", loras: tuple[LoraSpec, ...], unet: Mapping[str, Any]) -> None:
    """Add scale · alpha/rank · up·down of every LoRA to the weights of one network, in place.

    The LoRAs are checked ones, applied in order; `unet` is the UNet's configuration, which says how blocks are numbered
    in some files.

    Raises:
        CheckpointError: the LoRA's own settings are nonsense, or the file changed since it was checked.
    """
    for lora in loras:
        state = _diffusers_names(lora.path, read_tensors(lora.path), unet)
        if not any(key.startswith(f"{name}.") for key in state):
            continue
        try:
            _fuse(name, network, state, _adapter_metadata(lora.path), lora.scale)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{lora.path} can't be fused into {name}: {first_line(error)}") from error


def _fuse(name: str, network: Any, state: "dict[str, Tensor]", metadata: dict[str, Any] | None, scale: float) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders.lora_base import fuse_text_encoder_lora
    from diffusers.utils import recurse_remove_peft_layers

    arguments = {"network_alphas": None, "adapter_name": "lora", "metadata": metadata}
    if name == "unet":
        StableDiffusionXLPipeline.load_lora_into_unet(state, unet=network, **arguments)
        network.fuse_lora(lora_scale=scale)
        network.unload_lora()
    else:
        StableDiffusionXLPipeline.load_lora_into_text_encoder(state, text_encoder=network, prefix=name, **arguments)
        fuse_text_encoder_lora(network, lora_scale=scale)
        recurse_remove_peft_layers(network)
        del network.peft_config
        network._hf_peft_config_loaded = False
    network.requires_grad_(False)


def _diffusers_names(path: Path, tensors: "dict[str, Tensor]", unet: Mapping[str, Any]) -> "dict[str, Tensor]":
    """The matrices in diffusers' spelling ("unet.…", "text_encoder.…"), alpha/rank multiplied into `lora_up`."""
    from diffusers import StableDiffusionXLPipeline

    config = SimpleNamespace(**unet)
    try:
        state, _ = StableDiffusionXLPipeline.lora_state_dict(_without_alphas(path, tensors), unet_config=config)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no LoRA for SDXL: {first_line(error)}") from error
    # Of a text encoder's attention, diffusers knows its own old names only where all four projections are there.
    return {_OLD_TEXT_NAME.sub(r".\1_proj.lora_linear_layer.", name): tensor for name, tensor in state.items()}


def _without_alphas(path: Path, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """kohya's files scale each pair by alpha/rank; here it is done on the spot, exactly, and for each pair alone."""
    result = {name: t for name, t in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - result.keys():
        layer = name.removesuffix(".alpha")
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        if up not in result or down not in result:
            raise CheckpointError(f"{path} is not whole: {name} is there without lora_up and lora_down")
        result[up] = result[up].float() * (tensors[name].float() / result[down].shape[0])
    return result


def _adapter_metadata(path: Path) -> dict[str, Any] | None:
    """The settings that diffusers keeps in the header of the files it writes; alpha is among them."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    text = read_metadata(path).get(LORA_ADAPTER_METADATA_KEY, "null")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = text
    if settings is not None and not isinstance(settings, dict):
        raise CheckpointError(f"{path}: {LORA_ADAPTER_METADATA_KEY} in its header is not a JSON object of settings")
    return settings


def _peft_names(network: str, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The matrices for one network, under peft's names "<module>.lora_A.weight" and "…lora_B.weight"."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    prefix = f"{network}."
    mine = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if network == "unet" or not mine:
        return convert_unet_state_dict_to_peft(mine)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(mine))


def _check_parts(path: Path, name: str, parts: "Mapping[str, Tensor]", network: "nn.Module") -> None:
    modules = dict(network.named_modules())
    for key, tensor in parts.items():
        match = _PART.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{path}: {name}.{key} is no part of a plain LoRA", expected="lora_A and lora_B weights"
            )
        target = match["module"] if match["module"] in modules else match["module"].removeprefix("text_model.")
        weight = getattr(modules.get(target), "weight", None)
        if weight is None:
            raise CheckpointError(
                f"{path} doesn't fit this model: its {name} has no layer {match['module']}", expected="a LoRA for SDXL"
            )
        axis = 1 if match["part"] == "A" else 0
        if tensor.ndim != weight.ndim or tensor.shape[axis] != weight.shape[axis]:
            raise CheckpointError(
                f"{path} doesn't fit this model: {name}.{key} is {list(tensor.shape)} for a layer of "
                f"{list(weight.shape)}",
                expected="a LoRA for SDXL",
            )
        other = match["module"] + f".lora_{'B' if match['part'] == 'A' else 'A'}.weight"
        if other not in parts:
            raise CheckpointError(f"{path} is not whole: {name}.{key} is there without {other}")
