"""LoRAs: what a file changes in which layers, whether it fits the model, and adding it to the weights."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storyadapter.checkpoint.lora_names import NETWORKS, PEFT_PREFIX, Ambiguous, LoraNames, Unknown, other_kind
from storyadapter.checkpoint.outline import Outline
from storyadapter.checkpoint.paths import below, give, is_there, read_config
from storyadapter.checkpoint.tensor_files import read_headers, read_metadata, read_tensors
from storyadapter.method.errors import CheckpointError, Field

if TYPE_CHECKING:
    from torch import Tensor

_FILE_NAMES: Final = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers'
_FILE_NAMES_PEFT: Final = ("adapter_model.safetensors", "adapter_model.bin")
_SETTINGS_PEFT: Final = "adapter_config.json"
_SETTINGS_IN_HEADER: Final = "lora_adapter_metadata"  # as diffusers names it: JSON, keys "<network>.<setting>"
_KOHYA_ARGUMENTS: Final = "ss_network_args"
_EXPECTED: Final = "a LoRA or LoCon (down and up matrices, with or without a middle), or plain differences (diff)"
# Settings of peft that decide nothing once the matrices are there; any other that is set is refused.
_HARMLESS: Final = frozenset(
    ("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules")
    + ("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout")
    + ("low_cpu_mem_usage", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern")
    + ("revision", "runtime_config", "target_modules", "task_type")
)
_READ: Final = frozenset(("lora_alpha", "alpha_pattern", "use_rslora"))
# Ways to begin the training that leave the weights themselves as they are.
_HARMLESS_STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LayerChange:
    """What a LoRA adds to one layer: to its weight `factor` · up · (mid ·) down, or a difference; to its bias one."""

    module: str  # within the network
    names: Mapping[str, str]  # by part, see `lora_names`
    factor: float | None  # alpha / rank where settings say it; None: by the file's own alpha, else 1


@dataclass(frozen=True)
class Lora:
    """A LoRA that was found to fit: its files, and what it changes in each network."""

    path: Path
    settings: Path | None  # a file of peft's beside it that says its alpha
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor
    changes: Mapping[str, tuple[LayerChange, ...]]


def lora_file(path: Path) -> Path:
    """The file itself, or the one in a folder that diffusers or peft wrote.

    Raises:
        CheckpointError: the folder has none.
    """
    if not path.is_dir():
        return path
    for name in (*_FILE_NAMES, *_FILE_NAMES_PEFT):
        if is_there(path / name):
            return path / name
    files = below(path, lambda file: file.suffix == ".safetensors")
    advice = give(files) or "give the file itself"
    raise CheckpointError(Field("lora"), f" {path} has no {_FILE_NAMES[0]}", advice=advice)


def open_lora(path: Path, networks: Mapping[str, Outline]) -> Lora:
    """Read names and shapes of a LoRA, and compare them with the networks that it is meant for.

    Raises:
        CheckpointError: it is corrupt, of another kind (DoRA, LoKr, LoHa, …), or for another model.
    """
    headers, names = read_headers(path), LoraNames(networks)
    for name in headers:
        if kind := other_kind(name):
            raise CheckpointError(f"{path} is {kind} ({name})", expected=_EXPECTED)
    parts: dict[tuple[str, str], dict[str, str]] = {}
    for name in headers:
        meant = names.read(name)
        if isinstance(meant, Ambiguous):
            found = f"{path}: {name} doesn't say whether it is of {' or of '.join(meant.networks)}"
            raise CheckpointError(found, expected="names that begin with the network")
        if isinstance(meant, Unknown) and meant.network:
            found = f"{path} doesn't fit this model: its {meant.network} has no layer {meant.layer} ({name})"
            raise CheckpointError(found, expected="a LoRA for SDXL")
        if meant is None or isinstance(meant, Unknown):
            expected = "matrices for SDXL's UNet and text encoders, such as lora_down and lora_up"
            raise CheckpointError(f"{path} is no LoRA for SDXL: it holds {name}", expected=expected)
        other = parts.setdefault((meant.network, meant.module), {}).setdefault(meant.part, name)
        if other != name:
            raise CheckpointError(f"{path} has the same part of one layer twice: {other} and {name}")
    if not parts:
        raise CheckpointError(f"{path} is no LoRA for SDXL: it holds no tensors", expected=_EXPECTED)
    peft_settings = _peft_settings(path, headers)
    settings = _settings(path, peft_settings)
    changes: dict[str, list[LayerChange]] = {name: [] for name in NETWORKS}
    for (network, module), found in parts.items():
        _check_layer(path, found, headers, networks[network].shapes, module)
        factor = None
        if "down" in found and "alpha" not in found:
            factor = _factor(settings[network], module, headers[found["down"]].shape[0])
        changes[network].append(LayerChange(module, found, factor))
    shapes = {name: tuple(tensor.shape) for name, tensor in headers.items()}
    return Lora(path, peft_settings, shapes, {name: tuple(layers) for name, layers in changes.items()})


def fuse_lora(name: str, weights: "dict[str, Tensor]", lora: Lora, scale: float) -> None:
    """Add `scale` times what a LoRA changes to the weights of one network, computed in fp32.

    Args:
        weights: of the network, by its names; what is changed is replaced.

    Raises:
        CheckpointError: the file changed since it was checked.
    """
    import torch

    wanted = {file_name for change in lora.changes[name] for file_name in change.names.values()}
    device = next(iter(weights.values())).device
    tensors = read_tensors(lora.path, torch.float32, wanted.__contains__, device)
    if {file_name: tuple(t.shape) for file_name, t in tensors.items()} != {n: lora.shapes[n] for n in wanted}:
        raise CheckpointError(f"{lora.path} changed since it was checked; type the command again")
    with torch.no_grad():
        for change in lora.changes[name]:
            part = {part: tensors[file_name] for part, file_name in change.names.items()}
            weight, bias = f"{change.module}.weight", f"{change.module}.bias"
            for difference in _weight_differences(part, change.factor):
                weights[weight] = _sum(weights[weight], difference.reshape(weights[weight].shape), scale)
            if "diff_b" in part:
                weights[bias] = _sum(weights[bias], part["diff_b"], scale)


def _weight_differences(part: "Mapping[str, Tensor]", factor: float | None) -> "Iterator[Tensor]":
    import torch

    if "diff" in part:
        yield part["diff"]
    if "down" not in part:
        return
    down, up = part["down"], part["up"].flatten(1)
    rank = down.shape[0]
    if factor is None:
        factor = float(part["alpha"]) / rank if "alpha" in part else 1.0
    if "mid" in part:  # three convolutions in a row, of which only the middle one is wider than a pixel
        yield factor * torch.einsum("or,rs...,si->oi...", up, part["mid"], down.flatten(1))
    else:
        yield factor * (up @ down.flatten(1))


def _sum(weight: "Tensor", difference: "Tensor", scale: float) -> "Tensor":
    return (weight.float() + scale * difference).to(weight.dtype)


def _check_layer(
    path: Path, names: Mapping[str, str], headers: "Mapping[str, Tensor]", shapes: Mapping[str, list[int]], module: str
) -> None:
    """Raises CheckpointError unless the parts for one layer are complete and of its shape."""
    for part, others in (("down", ("up",)), ("up", ("down",)), ("mid", ("down", "up")), ("alpha", ("down", "up"))):
        if part in names and (missing := [other for other in others if other not in names]):
            without = " and ".join(f"lora_{other}" for other in missing)
            raise CheckpointError(f"{path} is not whole: {names[part]} is there without its {without}")
    for part, name in names.items():
        found, target = headers[name], shapes.get(f"{module}.{'bias' if part == 'diff_b' else 'weight'}")
        shape = list(found.shape)
        if target is None:
            raise CheckpointError(f"{path}: {name} is there for a layer without a bias", expected=_EXPECTED)
        if not found.is_floating_point():
            raise CheckpointError(f"{path}: {name} holds whole numbers", expected="fp32, fp16 or bf16")
        if not _fits(part, shape, target, names, headers):
            raise CheckpointError(
                f"{path} doesn't fit this model: {name} is {shape} for a layer of {target}", expected="a LoRA for SDXL"
            )


def _fits(
    part: str, shape: list[int], layer: list[int], names: Mapping[str, str], headers: "Mapping[str, Tensor]"
) -> bool:
    if part == "alpha":
        return math.prod(shape) == 1
    if part in ("diff", "diff_b"):
        return shape == layer
    down, up = (list(headers[names[part]].shape) for part in ("down", "up"))
    if min(len(down), len(up), len(layer), len(shape)) < 2 or 0 in (*down, *up):
        return False
    if part == "up":
        rank = up[1] if "mid" in names else down[0]  # the middle is compared with both
        return up[:2] == [layer[0], rank] and all(size == 1 for size in up[2:])
    if part == "mid":
        return len(layer) == 4 and shape == [up[1], down[0], *layer[2:]]
    return _trimmed(down[1:]) == _trimmed(layer[1:2] if "mid" in names else layer[1:])


def _trimmed(shape: list[int]) -> list[int]:
    """Without sizes of 1 at the end: a matrix is a convolution of one pixel."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _peft_settings(path: Path, headers: Mapping[str, Any]) -> Path | None:
    """The file in which peft keeps what its own files don't hold: alpha, for one.

    Raises:
        CheckpointError: these are peft's names, but it isn't there.
    """
    settings = path.with_name(_SETTINGS_PEFT)
    first = next((name for name in headers if name.startswith(PEFT_PREFIX)), None)
    if first is None or _SETTINGS_IN_HEADER in read_metadata(path):
        return None
    if not is_there(settings):
        raise CheckpointError(
            f"{path} is a LoRA as peft saves it ({first}), and {_SETTINGS_PEFT}, which has its alpha, is not beside it",
            expected="both in one folder",
        )
    return settings


def _settings(path: Path, file: Path | None) -> dict[str, dict[str, Any]]:
    """By network, the settings that a LoRA was trained with, from its header or from peft's file.

    Raises:
        CheckpointError: they are nonsense, or ask for what is no plain LoRA.
    """
    header = read_metadata(path)
    arguments = _json_object(header.get(_KOHYA_ARGUMENTS, "{}")) or {}
    if dora := next((n for n in ("dora_wd", "use_dora") if str(arguments.get(n)).lower() == "true"), None):
        found = f"{path} is a DoRA without its magnitudes ({_KOHYA_ARGUMENTS} in its header says {dora})"
        raise CheckpointError(found, expected=_EXPECTED)
    if file is not None:
        return dict.fromkeys(NETWORKS, _checked(file, read_config(file)))
    flat = _json_object(header.get(_SETTINGS_IN_HEADER, "{}"))
    if flat is None:
        raise CheckpointError(f"{path}: {_SETTINGS_IN_HEADER} in its header is not a JSON object of settings")
    by_network = {}
    for network in NETWORKS:
        mine = {key.removeprefix(f"{network}."): v for key, v in flat.items() if key.startswith(f"{network}.")}
        by_network[network] = _checked(path, mine)
    return by_network


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _checked(where: Path, settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():
        start = name == "init_lora_weights" and value not in _HARMLESS_STARTS
        if start or (value and name not in _HARMLESS | _READ):
            kind = "is a DoRA: it" if name == "use_dora" else "was trained in a way that isn't read here: it"
            raise CheckpointError(f"{where} {kind} says {name}: {json.dumps(value)[:80]}", expected=_EXPECTED)
    alphas = settings.get("alpha_pattern") or {}
    numbers = [settings.get("lora_alpha") or 0, *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise CheckpointError(f"{where}: lora_alpha and alpha_pattern", expected="numbers")
    if odd := next((key for key in alphas if re.search(r"[^\w.^$-]", key)), None):
        raise CheckpointError(f"{where}: alpha_pattern has the pattern {odd!r}", expected="names of layers")
    return settings


def _factor(settings: Mapping[str, Any], module: str, rank: int) -> float | None:
    """alpha / rank by the settings, or alpha / √rank; None if they have no alpha."""
    alpha = settings.get("lora_alpha")
    for key, own in (settings.get("alpha_pattern") or {}).items():
        if f".{module}".endswith(f".{key.strip('^$')}"):
            alpha = own
            break
    if alpha is None:
        return None
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
