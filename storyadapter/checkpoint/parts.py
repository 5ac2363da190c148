"""The five networks of a checkpoint: which files they are, and that they are SDXL's.

What the configuration files must say for the method to run on a model is checked here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint import component
from storyadapter.checkpoint.component import Component, Convert, folder_names
from storyadapter.checkpoint.file_kinds import FileKind, file_kind
from storyadapter.checkpoint.outline import Outline
from storyadapter.checkpoint.paths import (
    DIFFUSERS_STEMS,
    TRANSFORMERS_STEMS,
    CheckpointPaths,
    below,
    find,
    give,
    is_there,
    read_config,
    weight_files,
)
from storyadapter.checkpoint.tensor_files import read_headers
from storyadapter.method import constants
from storyadapter.method.errors import CheckpointError, Field, Text

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]

# UNet options that change what it computes and that the exported denoiser doesn't have.
_UNSUPPORTED_UNET = (
    *("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "time_embedding_act_fn"),
    "cross_attention_norm",
)
# Others that change what it computes: SDXL has none of them, under whatever value.
_UNSET_UNET = ("center_input_sample", "dual_cross_attention", "only_cross_attention", "mid_block_only_cross_attention")


def base_parts(paths: CheckpointPaths) -> tuple[dict[str, Component], Path]:
    """UNet, text encoders and VAE, and the folder with the base model's configurations and tokenizers.

    Raises:
        CheckpointError: something is missing, or a configuration isn't SDXL's.
    """
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
    _check_base("base_model" if file is None else "base_config", folder)
    _check_pipeline(folder)
    if file is not None:
        component.check_single_file(file, needs_vae=paths.vae is None)
    source = _Source(file, paths.variant)

    def text_encoder(name: str, title: str, kind: str, prefix: str, convert: Convert) -> Component:
        return source.part(title, folder / name, _check_text_encoder, kind, TRANSFORMERS_STEMS, prefix, convert)

    first, second = "text_encoder", "text_encoder_2"
    parts = {
        "unet": _unet(paths, folder, source),
        first: text_encoder(
            first, "text encoder 1", "CLIPTextModel", component.TEXT_PREFIX, component.convert_text_encoder
        ),
        second: text_encoder(
            second,
            "text encoder 2",
            "CLIPTextModelWithProjection",
            component.TEXT_PREFIX_2,
            component.convert_text_encoder_2,
        ),
        "vae": _vae(paths, folder, source),
    }
    return parts, folder


def image_encoder_part(paths: CheckpointPaths) -> Component:
    """The CLIP vision model with projection. Raises CheckpointError: it isn't one, or its files are missing."""
    folder = find("image_encoder", paths.image_encoder)
    if not folder.is_dir():
        expected = "a folder with config.json and weights"
        raise CheckpointError(Field("image_encoder"), f" {folder} is a file", expected=expected)
    check_folder("image_encoder", folder, lambda config: config.get("model_type") in ("clip", "clip_vision_model"))
    config = _vision_config(folder / "config.json", _config(folder))

    return Component(
        "the image encoder",
        folder / "config.json",
        "CLIPVisionModelWithProjection",
        config,
        weight_files(folder, TRANSFORMERS_STEMS, None),
        _vision_half,
    )


def _vision_half(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """A whole CLIP model serves too."""
    text_half = ("text_model.", "text_projection.", "logit_scale")
    return folder_names(network, {name: t for name, t in tensors.items() if not name.startswith(text_half)})


@dataclass(frozen=True)
class _Source:
    """Where weights come from: a single file, or the folders of the configurations."""

    file: Path | None
    variant: str | None

    def part(
        self,
        title: Text,
        folder: Path,
        check: Callable[[Path, Config], None],
        kind: str,
        stems: tuple[str, str],
        prefix: str,
        convert: Convert,
        **overrides: Any,
    ) -> Component:
        config, config_file = _config(folder), folder / "config.json"
        check(config_file, config)
        config |= overrides
        if self.file is None:
            files = weight_files(folder, stems, self.variant)
            return Component(title, config_file, kind, config, files, folder_names)
        return Component(title, config_file, kind, config, (self.file,), convert, prefix)


def _unet(paths: CheckpointPaths, base: Path, source: _Source) -> Component:
    """The base model's, or the one given: a diffusers folder, or a file of the base model's configuration."""
    title: Text = "the UNet"
    folder, prefix, convert, overrides = base / "unet", component.UNET_PREFIX, None, {}
    if paths.unet is not None:
        path, title = find("unet", paths.unet), ("the UNet given with ", Field("unet"))
        if path.is_dir():
            folder = path / "unet" if (path / "unet" / "config.json").exists() else path
            check_folder("unet", folder, lambda config: config.get("_class_name") == "UNet2DConditionModel")
            source = _Source(None, paths.variant)
        else:
            headers = read_headers(path)
            source, prefix, convert = _Source(path, None), "", component.convert_unet_file
            if any(name.startswith(component.UNET_PREFIX) for name in headers):
                prefix, convert = component.UNET_PREFIX, None
            width = next(
                (t.shape[-1] for name, t in headers.items() if name.endswith("cond_proj.weight") and t.ndim), None
            )
            overrides = {"time_cond_proj_dim": width}
    kind, stems, convert = "UNet2DConditionModel", DIFFUSERS_STEMS, convert or component.convert_unet
    return source.part(title, folder, _check_unet, kind, stems, prefix, convert, **overrides)


def _vae(paths: CheckpointPaths, base: Path, source: _Source) -> Component:
    """The base model's, or the one given: a folder with a configuration, or a file in either layout without one."""
    title: Text = "the VAE"
    folder, prefix = base / "vae", component.VAE_PREFIX
    if paths.vae is not None:
        path, title = find("vae", paths.vae), ("the VAE given with ", Field("vae"))
        if path.is_dir():
            check_folder("vae", path, lambda config: config.get("_class_name") == "AutoencoderKL")
            folder, source = path, _Source(None, paths.variant)
        else:
            _check_single("vae", path)
            source, prefix = _Source(path, None), ""
    return source.part(title, folder, _check_vae, "AutoencoderKL", DIFFUSERS_STEMS, prefix, component.convert_vae)


def _check_single(field: str, file: Path) -> None:
    """Raises CheckpointError unless the file is `.safetensors`, whatever its name."""
    kind = file_kind(file)
    if kind is not FileKind.SAFETENSORS:
        found = f" {file} is {kind.value}"
        raise CheckpointError(Field(field), found, expected="a diffusers folder, or one .safetensors file")


def _base_config(file: Path, paths: CheckpointPaths) -> Path:
    _check_single("base_model", file)
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


def check_folder(field: str, folder: Path, fits: Callable[[Config], bool]) -> None:
    """Raises CheckpointError if a network's folder has no configuration; told is which folder below it has one."""
    if is_there(folder / "config.json"):
        return
    places = below(folder, lambda path: path.name == "config.json" and fits(read_config(path)))
    raise CheckpointError(
        Field(field),
        f" {folder} has no config.json",
        expected="" if places else "the folder of a model, which has one",
        advice=give([place.parent for place in places]),
    )


def _check_base(field: str, folder: Path) -> None:
    """Raises CheckpointError if the folder isn't a model's, but one above or below is."""
    if is_there(folder / "unet"):
        return
    unets = below(folder, lambda path: path.name == "unet" and is_there(path / "config.json"))
    places = [path.parent for path in unets]
    if not places and is_there(folder.absolute().parent / "model_index.json"):
        places = [folder.absolute().parent]
    if places:
        raise CheckpointError(Field(field), f" {folder} has no unet in it", advice=give(places))


def _check_pipeline(folder: Path) -> None:
    """Raises CheckpointError if `model_index.json`, where there is one, names a pipeline that isn't SDXL's."""
    index = folder / "model_index.json"
    if is_there(index):
        found = read_config(index).get("_class_name")
        if not isinstance(found, str) or not found.startswith("StableDiffusionXL") or "Inpaint" in found:
            raise CheckpointError(f"{folder} is a {found}", expected="an SDXL base model (StableDiffusionXLPipeline)")


def _check_unet(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is the UNet of an SDXL base model."""
    _expect_class(path, config, "UNet2DConditionModel")
    channels = (config.get("in_channels"), config.get("out_channels"))
    if channels == (9, constants.LATENT_CHANNELS):
        raise CheckpointError(
            f"{path}: an inpainting UNet with 9 input channels", expected="an SDXL base model's with 4"
        )
    if channels != (constants.LATENT_CHANNELS,) * 2:
        raise CheckpointError(f"{path}: {channels[0]} input and {channels[1]} output channels", expected="4 and 4")
    if config.get("addition_embed_type") != "text_time":
        raise CheckpointError(
            f"{path}: not an SDXL UNet: addition_embed_type is {config.get('addition_embed_type')!r} and the text is "
            f"{config.get('cross_attention_dim')} wide",
            expected="'text_time' and SDXL's 2048",
        )
    for option in _UNSUPPORTED_UNET:
        if config.get(option) is not None:
            raise CheckpointError(f"{path}: {option} is {config[option]!r}", expected="a UNet of SDXL, which has none")
    for option in _UNSET_UNET:
        if config.get(option):
            raise CheckpointError(f"{path}: {option} is {config[option]!r}", expected="a UNet of SDXL, where it is off")
    if config.get("attention_type", "default") != "default":
        raise CheckpointError(f"{path}: attention_type is {config['attention_type']!r}", expected="SDXL's 'default'")


def check_widths(unet_path: Path, unet: Config, text_width: int, text_width_2: int, pooled_width: int) -> None:
    """Raises CheckpointError unless the UNet takes the text of these two encoders.

    `projection_class_embeddings_input_dim` counts the pooled text and the embeddings of SDXL's six sizes.
    """
    if unet.get("cross_attention_dim") != text_width + text_width_2:
        raise CheckpointError(
            f"{unet_path}: the UNet takes text {unet.get('cross_attention_dim')} wide, "
            f"the text encoders give {text_width} + {text_width_2}",
            expected="an SDXL base model with both of its text encoders",
        )
    embedded = unet.get("addition_time_embed_dim")
    expected = pooled_width + 6 * embedded if isinstance(embedded, int) else None
    found = unet.get("projection_class_embeddings_input_dim")
    if found != expected:
        raise CheckpointError(
            f"{unet_path}: projection_class_embeddings_input_dim is {found}",
            expected=f"{expected} for pooled text {pooled_width} wide and six sizes (a refiner has five)",
        )


def _check_vae(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is an SDXL VAE."""
    _expect_class(path, config, "AutoencoderKL")
    if config.get("latent_channels") != constants.LATENT_CHANNELS:
        raise CheckpointError(f"{path}: {config.get('latent_channels')} latent channels", expected="SDXL's 4")
    for option in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(option) is not None:
            raise CheckpointError(f"{path}: {option} is set", expected="an SDXL VAE, whose latents are only scaled")


def _check_text_encoder(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is a CLIP text model of 77 positions."""
    if config.get("model_type") != "clip_text_model":
        raise CheckpointError(f"{path}: a {config.get('model_type')!r} model", expected="'clip_text_model'")
    positions = config.get("max_position_embeddings", constants.TEXT_TOKENS)
    if positions != constants.TEXT_TOKENS:
        raise CheckpointError(f"{path}: {positions} text positions", expected=f"{constants.TEXT_TOKENS}")


def _vision_config(path: Path, config: Config) -> Config:
    """The vision part of a CLIP configuration, of the image encoder alone or of a whole CLIP model.

    Raises:
        CheckpointError: it isn't CLIP's, or the model takes pictures of another size than CLIP's preprocessing makes.
    """
    kind = config.get("model_type")
    if kind == "clip" and isinstance(config.get("vision_config"), dict):
        config = {**config["vision_config"], "projection_dim": config.get("projection_dim", 512)}
    elif kind != "clip_vision_model":
        found = f"a {kind!r} model" if kind else "no model_type there"
        raise CheckpointError(
            f"{path}: {found}",
            expected="a CLIP image encoder ('clip_vision_model'), such as the folder sdxl_models/image_encoder beside "
            "the IP-Adapter",
        )
    if config.get("image_size", constants.CLIP_PIXELS) != constants.CLIP_PIXELS:
        raise CheckpointError(f"{path}: pictures of {config['image_size']} pixels", expected=f"{constants.CLIP_PIXELS}")
    return config


def _expect_class(path: Path, config: Config, name: str) -> None:
    if config.get("_class_name") != name:
        raise CheckpointError(f"{path}: configuration of {config.get('_class_name')}", expected=name)
