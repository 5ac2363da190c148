"""Which files make up the five networks of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint import configs, single_file
from storyadapter.checkpoint.component import Component, Convert, folder_names
from storyadapter.checkpoint.locate import DIFFUSERS_STEMS, TRANSFORMERS_STEMS, find, read_config, weight_files
from storyadapter.checkpoint.paths import CheckpointPaths
from storyadapter.checkpoint.tensor_files import is_safetensors
from storyadapter.method.errors import CheckpointError, Field, Text

if TYPE_CHECKING:
    from torch import Tensor, nn


def base_parts(paths: CheckpointPaths) -> tuple[dict[str, Component], Path]:
    """UNet, text encoders and VAE, and the folder with the base model's configurations and tokenizers.

    Raises:
        CheckpointError: something is missing, or a configuration isn't SDXL's.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    base = find("base_model", paths.base_model)
    file = None if base.is_dir() else base
    folder = base if file is None else _base_config(file, paths)
    if file is None and paths.base_config is not None:
        raise CheckpointError(
            Field("base_config"),
            f" {paths.base_config} belongs to a single-file ",
            Field("base_model"),
            f", but {base} is a folder",
            advice="leave it out",
        )
    configs.check_pipeline(folder)
    if file is not None:
        single_file.check_kind(file, needs_vae=paths.vae is None)
    source = _Source(file, paths.variant)
    parts = {
        "unet": _unet(folder / "unet", source),
        "text_encoder": _text_encoder(folder / "text_encoder", CLIPTextModel, source),
        "text_encoder_2": _text_encoder(folder / "text_encoder_2", CLIPTextModelWithProjection, source),
        "vae": _vae(folder / "vae", source) if paths.vae is None else _other_vae(paths, folder),
    }
    return parts, folder


def image_encoder_part(paths: CheckpointPaths) -> Component:
    """The CLIP vision model with projection.

    Raises:
        CheckpointError: it isn't one, or its files are missing.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = find("image_encoder", paths.image_encoder)
    if not folder.is_dir():
        expected = "a folder with config.json and weights"
        raise CheckpointError(Field("image_encoder"), f" {folder} is a file", expected=expected)
    config = configs.vision_config(folder / "config.json", _config(folder))

    def vision_half(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        # A whole CLIP model serves too.
        text_half = ("text_model.", "text_projection.", "logit_scale")
        return folder_names(network, {name: t for name, t in tensors.items() if not name.startswith(text_half)})

    return Component(
        "the image encoder",
        folder / "config.json",
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(config))),
        weight_files(folder, TRANSFORMERS_STEMS, None),
        vision_half,
    )


@dataclass(frozen=True)
class _Source:
    """Where the base model's weights come from: a single file, or the folders of the configurations."""

    file: Path | None
    variant: str | None

    def part(
        self,
        title: Text,
        folder: Path,
        build: "Callable[[], nn.Module]",
        stems: tuple[str, str],
        prefix: str,
        convert: Convert,
    ) -> Component:
        config_file = folder / "config.json"
        if self.file is None:
            return Component(title, config_file, build, weight_files(folder, stems, self.variant), folder_names)
        return Component(title, config_file, build, (self.file,), convert, prefix)


def _unet(folder: Path, source: _Source) -> Component:
    from diffusers import UNet2DConditionModel

    config = _config(folder)
    configs.check_unet(folder / "config.json", config)
    return source.part(
        "the UNet",
        folder,
        lambda: UNet2DConditionModel.from_config(config),
        DIFFUSERS_STEMS,
        single_file.UNET_PREFIX,
        single_file.convert_unet,
    )


def _text_encoder(folder: Path, model_class: Any, source: _Source) -> Component:
    from transformers import CLIPTextConfig

    config = _config(folder)
    configs.check_text_encoder(folder / "config.json", config)
    second = folder.name == "text_encoder_2"
    return source.part(
        "text encoder 2" if second else "text encoder 1",
        folder,
        lambda: model_class(CLIPTextConfig.from_dict(config)),
        TRANSFORMERS_STEMS,
        single_file.TEXT_PREFIX_2 if second else single_file.TEXT_PREFIX,
        single_file.convert_text_encoder_2 if second else single_file.convert_text_encoder,
    )


def _vae(folder: Path, source: _Source, title: Text = "the VAE") -> Component:
    config = _config(folder)
    configs.check_vae(folder / "config.json", config)
    return source.part(
        title, folder, _vae_builder(config), DIFFUSERS_STEMS, single_file.VAE_PREFIX, single_file.convert_vae
    )


def _other_vae(paths: CheckpointPaths, base: Path) -> Component:
    """Another VAE: a folder with a configuration, or a file in either layout that shares the base model's."""
    path = find("vae", paths.vae or "")
    title = ("the VAE given with ", Field("vae"))
    if path.is_dir():
        return _vae(path, _Source(None, paths.variant), title)
    if not is_safetensors(path):
        found = f" {path} is neither a folder nor a .safetensors file"
        raise CheckpointError(Field("vae"), found, expected="one of these")
    config = _config(base / "vae")
    configs.check_vae(base / "vae" / "config.json", config)
    return Component(title, base / "vae" / "config.json", _vae_builder(config), (path,), single_file.convert_vae)


def _vae_builder(config: dict[str, Any]) -> "Callable[[], nn.Module]":
    from diffusers import AutoencoderKL

    return lambda: AutoencoderKL.from_config(config)


def _base_config(file: Path, paths: CheckpointPaths) -> Path:
    if not is_safetensors(file):
        raise CheckpointError(
            Field("base_model"),
            f" {file} is neither a diffusers folder nor a .safetensors file",
            expected="one of these",
        )
    if paths.base_config is None:
        raise CheckpointError(
            Field("base_model"),
            f" {file} is a single file, which has no tokenizers and no configurations",
            advice=("give ", Field("base_config"), " DIR with a diffusers SDXL folder (its weights aren't needed)"),
        )
    if paths.variant is not None:
        raise CheckpointError(f"the variant {paths.variant} belongs to a diffusers folder, but {file} is a single file")
    folder = find("base_config", paths.base_config)
    if not folder.is_dir():
        raise CheckpointError(Field("base_config"), f" {folder} is a file", expected="a diffusers SDXL folder")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing", expected=f"a diffusers SDXL folder with a folder {folder.name} in it"
        )
    return read_config(folder / "config.json")
