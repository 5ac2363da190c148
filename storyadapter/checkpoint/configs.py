"""Is this SDXL? What the configuration files must say for the method to run on a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storyadapter.method import constants
from storyadapter.method.errors import CheckpointError, Field

Config = Mapping[str, Any]

# UNet options that change what it computes and that the exported denoiser doesn't have.
_UNSUPPORTED_UNET = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_embedding_act_fn")

# Written by the libraries beside what they describe; no code depends on it.
_NOTES = ("architectures", "dtype", "torch_dtype", "transformers_version")


def settings(config: Any) -> Config:
    """What a network's code depends on, defaults filled in, of the configuration of diffusers or transformers."""
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in _NOTES}


def check_pipeline(folder: Path) -> None:
    """Raises CheckpointError if `model_index.json`, where there is one, names a pipeline that isn't SDXL's."""
    from storyadapter.checkpoint.locate import read_config

    index = folder / "model_index.json"
    if index.exists():
        found = read_config(index).get("_class_name")
        if not isinstance(found, str) or not found.startswith("StableDiffusionXL") or "Inpaint" in found:
            raise CheckpointError(f"{folder} is a {found}", expected="an SDXL base model (StableDiffusionXLPipeline)")


def check_unet(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is the UNet of an SDXL base model."""
    expect_class(path, config, "UNet2DConditionModel")
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
    if config.get("time_cond_proj_dim") is not None:
        raise CheckpointError(
            f"{path}: a guidance-distilled UNet (time_cond_proj_dim is {config['time_cond_proj_dim']}), such as LCM's",
            expected="an SDXL base model",
            advice=("use it with the LCM LoRA instead (", Field("lora"), ")"),
        )
    for option in _UNSUPPORTED_UNET:
        if config.get(option) is not None:
            raise CheckpointError(f"{path}: {option} is {config[option]!r}", expected="a UNet of SDXL, which has none")


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


def check_vae(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is an SDXL VAE."""
    expect_class(path, config, "AutoencoderKL")
    if config.get("latent_channels") != constants.LATENT_CHANNELS:
        raise CheckpointError(f"{path}: {config.get('latent_channels')} latent channels", expected="SDXL's 4")
    for option in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(option) is not None:
            raise CheckpointError(f"{path}: {option} is set", expected="an SDXL VAE, whose latents are only scaled")


def check_text_encoder(path: Path, config: Config) -> None:
    """Raises CheckpointError unless this is a CLIP text model of 77 positions."""
    if config.get("model_type") != "clip_text_model":
        raise CheckpointError(f"{path}: a {config.get('model_type')!r} model", expected="'clip_text_model'")
    positions = config.get("max_position_embeddings", constants.TEXT_TOKENS)
    if positions != constants.TEXT_TOKENS:
        raise CheckpointError(f"{path}: {positions} text positions", expected=f"{constants.TEXT_TOKENS}")


def vision_config(path: Path, config: Config) -> Config:
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


def expect_class(path: Path, config: Config, name: str) -> None:
    if config.get("_class_name") != name:
        raise CheckpointError(f"{path}: configuration of {config.get('_class_name')}", expected=name)
