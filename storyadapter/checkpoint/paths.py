"""What the user typed, and the files that it stands for: hub names, variants, shards, configuration files."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from storyadapter.demo.shipped import LORAS, MODEL
from storyadapter.method.errors import CheckpointError, Field, InputError, can_not_be_read, said

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<inner>/.+)?", re.ASCII)
_LEVELS, _LOOKED_AT = 3, 5000  # below a folder that isn't the one that is needed
_MAX_CONFIG = 16 << 20  # bytes; the index of a sharded model has some hundred thousand
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA and how much of it is fused into the model.

    `path` is a file, or a folder or hub name with a `pytorch_lora_weights.safetensors` in it; `parse` also takes the
    name of a LoRA that ships with the demo model.
    """

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraSpec":
        """Read "P" or "P:scale". What follows the last colon is the scale if it is a number, else part of the path.

        A path that itself ends in a colon and a number needs its scale spelled out: "a:1:1.0". `str()` gives such a
        text back.

        Raises:
            InputError: the path is empty, the scale is too large for a number or written with a comma.
        """
        path, colon, number = text.rpartition(":")
        with_point = number.replace(",", ".")
        if colon and with_point != number and _NUMBER.fullmatch(with_point) and not os.path.exists(text):
            found = f" {text!r}: the scale {number} has a comma"
            raise InputError(Field("lora"), found, expected=f"{path}:{with_point}, written with a point")
        if not colon or not _NUMBER.fullmatch(number):
            path, number = text, "1"
        if not path:
            expected = "PATH or PATH:SCALE, such as style.safetensors:0.8"
            raise InputError(Field("lora"), f" {text!r} has no path", expected=expected)
        scale = float(number)
        if not math.isfinite(scale):
            found = f" {text!r}: the scale {number} is too large"
            raise InputError(Field("lora"), found, expected="a number such as 0.8")
        return cls(LORAS.get(path) or Path(path), scale)

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


@dataclass(frozen=True)
class CheckpointPaths:
    """The model files of a run, as typed. A name that is no path is looked up in the local Hugging Face cache."""

    base_model: Path | str  # a diffusers SDXL folder, or a single `.safetensors` file in the original layout
    image_encoder: Path | str  # a folder with a CLIP vision model with projection (transformers)
    ip_adapter: Path | str  # the plain 4-token IP-Adapter for SDXL, `.bin` or `.safetensors`
    # for a single file: a diffusers folder with its configuration files and tokenizers
    base_config: Path | str | None = None
    # another UNet: a diffusers folder, or a file in diffusers' or the original layout, which has the base model's sizes
    unet: Path | str | None = None
    vae: Path | str | None = None  # another VAE: a diffusers folder, or a `.safetensors` file
    loras: tuple[LoraSpec, ...] = ()  # fused into the UNet and the text encoders, in this order
    controlnets: tuple[Path | str, ...] = ()  # for SDXL: diffusers folders, or files of the UNet's sizes
    # a tiny VAE for pictures that only become references: a diffusers folder, or a file of the usual sizes
    reference_vae: Path | str | None = None
    # take `*.<variant>.safetensors` and the like where a network has both; without it, the plain files
    variant: str | None = None

    @classmethod
    def given(
        cls,
        base_model: Path | str | None,
        image_encoder: Path | str | None,
        ip_adapter: Path | str | None,
        *,
        base_config: Path | str | None = None,
        unet: Path | str | None = None,
        vae: Path | str | None = None,
        loras: tuple[LoraSpec, ...] = (),
        controlnets: tuple[Path | str, ...] = (),
        reference_vae: Path | str | None = None,
        variant: str | None = None,
    ) -> "CheckpointPaths":
        """The model that was asked for, or the demo model with these LoRAs and ControlNets.

        Raises:
            InputError: only some of its three parts were given, or what belongs to a model without one.
        """
        parts = {"base_model": base_model, "image_encoder": image_encoder, "ip_adapter": ip_adapter}
        all_parts = ("all of ", Field("base_model"), ", ", Field("image_encoder"), " and ", Field("ip_adapter"))
        missing = [name for name, value in parts.items() if not value]
        if len(missing) < len(parts):
            if missing:
                named = ((Field(name), " and ") for name in missing)
                found = tuple(word for pair in named for word in pair)[:-1]
                raise InputError(*found, " missing", expected=(all_parts, ", or none for the demo model"))
            assert base_model and image_encoder and ip_adapter
            more = base_config, unet, vae, loras, controlnets, reference_vae, variant
            return cls(base_model, image_encoder, ip_adapter, *more)
        of_a_model = {"base_config": base_config, "unet": unet, "vae": vae, "reference_vae": reference_vae}
        for name, value in (of_a_model | {"variant": variant}).items():
            if value:
                raise InputError(Field(name), " was given without ", Field("base_model"), expected=all_parts)
        adapter = MODEL / "ip-adapter.safetensors"
        return cls(MODEL, MODEL / "image_encoder", adapter, loras=loras, controlnets=controlnets)

    @property
    def is_demo(self) -> bool:
        """Whether it is the demo model, which knows few words."""
        return Path(self.base_model) == MODEL


def find(field: str, name: Path | str) -> Path:
    """The file or folder that `name` stands for: a path, or "owner/name[/path inside]" in the Hugging Face cache.

    Raises:
        CheckpointError: neither is there; the message names the `field` of `CheckpointPaths`.
    """
    path = Path(os.path.expanduser(name))  # pathlib's raises an error for users that don't exist
    try:
        if is_there(path):
            return path
    except CheckpointError as error:
        raise CheckpointError(Field(field), " ", *error.args) from error
    hub_name = _HUB_NAME.fullmatch(str(name))
    if hub_name is None:
        raise CheckpointError(Field(field), f" {name}: there is no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, inside = hub_name["repo"], (hub_name["inner"] or "").lstrip("/")
    advice = f"fetch it first: hf download {repo}"
    try:
        path = Path(snapshot_download(repo, local_files_only=True)) / inside
    except (LocalEntryNotFoundError, HFValidationError):
        found = "there is no such file or folder, and no model of that name in the local Hugging Face cache"
        raise CheckpointError(Field(field), f" {name}: {found}", advice=f"give a path, or {advice}") from None
    if not is_there(path):
        found = f"{repo} is in the local Hugging Face cache, but without {inside}"
        raise CheckpointError(Field(field), f" {name}: {found}", advice=advice)
    return path


def is_there(path: Path) -> bool:
    """Whether there is a file or folder, links followed.

    Raises:
        CheckpointError: the system can't say, such as for want of permission, or it is a link to what isn't there.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which isn't there") from None
        return False
    except (OSError, ValueError) as error:  # ValueError: a null byte, which no path has
        raise CheckpointError(can_not_be_read(path, error)) from error
    return True


def below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """What is wanted of a folder's contents, up to three levels down, in order; the first thousands are looked at."""
    found, level = [], [folder]
    for _ in range(_LEVELS):
        try:
            level = sorted(islice((p for parent in level if parent.is_dir() for p in parent.iterdir()), _LOOKED_AT))
            found += [path for path in level if wanted(path)]
        except (OSError, CheckpointError):  # it is advice only
            break
    return found


def give(paths: Sequence[Path]) -> str:
    """The advice to give one of these; empty where there are none."""
    if len(paths) > 1:
        return f"give one of {', '.join(map(str, paths[:3]))}{', …' if len(paths) > 3 else ''}"
    return f"give {paths[0]}" if paths else ""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError: the file is missing, unreadable, or something else."""
    if not is_there(path):
        raise CheckpointError(f"{path} is missing", expected="the folder of a model, which has one")
    if not (path.is_file() or path.is_dir()):  # reading a pipe or a device may never end
        raise CheckpointError(f"{path} is no regular file", expected="a configuration in JSON")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG + 1)
        if len(data) > _MAX_CONFIG:
            raise CheckpointError(f"{path} is longer than {_MAX_CONFIG >> 20} MiB", expected="a configuration in JSON")
        config = json.loads(data.decode())
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({said(error)}); the file is corrupt, fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}", expected="an object with settings")
    return config


# The stems under which diffusers and transformers save weights, each for .safetensors and for pickles.
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS_STEMS = ("model", "pytorch_model")


def weight_files(folder: Path, stems: tuple[str, str], variant: str | None) -> tuple[Path, ...]:
    """The files that hold one network's weights; of a sharded network the index comes first.

    Files of the variant asked for come first, then plain files, then those of the only variant there is;
    `.safetensors` comes before `.bin` each time.

    Raises:
        CheckpointError: there are no weights, several variants and none asked for, or the index is corrupt.
    """
    for candidate in ([variant] if variant else []) + [None]:
        if files := _files_of_variant(folder, stems, candidate):
            return files
    variants = sorted(set(_variants(folder, stems)))
    if len(variants) == 1:
        return _files_of_variant(folder, stems, variants[0])
    if variants:
        raise CheckpointError(
            f"{folder} has weights of the variants {', '.join(variants)} only",
            advice=("say which one with ", Field("variant")),
        )
    raise CheckpointError(f"{folder} has no weights", expected=f"{stems[0]}.safetensors or {stems[1]}.bin")


def _files_of_variant(folder: Path, stems: tuple[str, str], variant: str | None) -> tuple[Path, ...]:
    infix = f".{variant}" if variant else ""
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        whole = folder / f"{stem}{infix}.{suffix}"
        if is_there(whole):
            return (whole,)
        index = folder / f"{stem}.{suffix}.index{infix}.json"
        if is_there(index):
            return (index, *_shards(index))
    return ()


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; the file is corrupt, fetch it again")
    shards = {name: index.parent / name for name in sorted(set(names.values()))}
    for name, shard in shards.items():
        if shard.parent != index.parent:
            raise CheckpointError(f"{index} names {name!r}", expected="files beside it")
        if not is_there(shard):
            raise CheckpointError(f"{shard} is missing; {index.name} lists {len(shards)} shards")
    return tuple(shards.values())


def _variants(folder: Path, stems: tuple[str, str]) -> Iterator[str]:
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        # A shard is no variant; its index is.
        whole = re.compile(rf"{re.escape(stem)}\.((?!.*-\d{{5}}-of-\d{{5}})[\w-]+)\.{suffix}")
        index = re.compile(rf"{re.escape(stem)}\.{suffix}\.index\.([\w-]+)\.json")
        for path in folder.glob("*"):
            if match := whole.fullmatch(path.name) or index.fullmatch(path.name):
                yield match[1]
