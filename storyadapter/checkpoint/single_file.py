"""SDXL in one `.safetensors` file of the original layout, converted by diffusers' own functions.

The same functions convert the header's shapes for the check and the weights for loading.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint.component import folder_names
from storyadapter.checkpoint.tensor_files import read_headers
from storyadapter.method.errors import CheckpointError, Field

if TYPE_CHECKING:
    from torch import Tensor, nn

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "conditioner.embedders.0.transformer."
TEXT_PREFIX_2 = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."

# What diffusers calls the kinds of single files, in words.
_KINDS = {
    "v1": "Stable Diffusion 1.x or an unknown layout",
    "v2": "Stable Diffusion 2.x",
    "xl_refiner": "the SDXL refiner",
    "xl_inpaint": "an SDXL inpainting model",
    "inpainting": "a Stable Diffusion 1.x inpainting model",
}


def check_kind(path: Path, needs_vae: bool) -> None:
    """Raises CheckpointError unless the file holds a whole SDXL base model (its VAE only if that is needed)."""
    headers = read_headers(path)
    missing = [
        f"{title} ({prefix}*)"
        for title, prefix, needed in (
            ("the UNet", UNET_PREFIX, True),
            ("text encoder 1", TEXT_PREFIX, True),
            ("text encoder 2", TEXT_PREFIX_2, True),
            ("the VAE", VAE_PREFIX, needs_vae),
        )
        if needed and not any(name.startswith(prefix) for name in headers)
    ]
    if len(missing) == 1 and missing[0].startswith("the VAE"):
        raise CheckpointError(f"{path} holds no VAE ({VAE_PREFIX}*)", advice=("give one with ", Field("vae")))
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: it looks like {_kind(headers)}",
            expected="an SDXL base model in the original single-file layout",
        )
    if (first := headers.get(f"{UNET_PREFIX}input_blocks.0.0.weight")) is not None and first.shape[1] == 9:
        raise CheckpointError(f"{path} is an inpainting model with 9 input channels", expected="an SDXL base model")


def _kind(headers: "dict[str, Tensor]") -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if not any(name.startswith((UNET_PREFIX, "cond_stage_model.", "conditioner.")) for name in headers):
        return f"no Stable Diffusion model ({len(headers)} tensors, the first is {next(iter(headers), 'absent')})"
    kind = infer_diffusers_model_type(headers)
    return _KINDS.get(kind, kind)


def convert_unet(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return _nothing_lost(tensors, convert_ldm_unet_checkpoint(tensors, config=_config(network)))


def convert_vae(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a single file's VAE, or of a VAE alone, in the original layout or in diffusers' own."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return folder_names(network, tensors)
    # Training leftovers that some files keep beside the VAE.
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    return _nothing_lost(tensors, convert_ldm_vae_checkpoint(tensors, config=_config(network)))


def convert_text_encoder(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    return folder_names(network, convert_ldm_clip_checkpoint(tensors))


def convert_text_encoder_2(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    converted = convert_open_clip_checkpoint(network, tensors, prefix=TEXT_PREFIX_2)
    kept = {id(tensor) for tensor in converted.values()}
    # The conversion splits and transposes these, and has no use for CLIP's temperature.
    used = tuple(TEXT_PREFIX_2 + name for name in ("transformer.", "text_projection", "logit_scale"))
    dropped = {name: t for name, t in tensors.items() if id(t) not in kept and not name.startswith(used)}
    return {**converted, **dropped}


def _config(network: "nn.Module") -> dict[str, Any]:
    return dict(network.config)


def _nothing_lost(before: "dict[str, Tensor]", after: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """`after`, with what the conversion dropped under its old name, so that the comparison reports it.

    The conversions rename tensor by tensor and pass over names they don't know. A renamed tensor stays the same object,
    except for the matrices of a VAE's attention, which lose their 1x1 dimensions.
    """
    if len(before) == len(after):
        return after
    kept = {id(tensor) for tensor in after.values()}
    dropped = {name: t for name, t in before.items() if id(t) not in kept and ".attn_1." not in name}
    return {**after, **dropped}
