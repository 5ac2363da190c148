"""The IP-Adapter: which kind a file holds, whether it fits the UNet and the image encoder, and its tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.checkpoint.component import compare
from storyadapter.checkpoint.outline import Outline
from storyadapter.checkpoint.tensor_files import read_headers, read_tensors
from storyadapter.method import constants
from storyadapter.method.errors import CheckpointError, Field
from storyadapter.model.ip_adapter import AdapterLayer, IPAdapterWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_EXPECTED = "expected the plain 4-token IP-Adapter for SDXL, such as ip-adapter_sdxl.safetensors"
_PROJECTION = ("image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias")
_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")


@dataclass(frozen=True)
class CrossAttention:
    """A cross-attention layer of the UNet: its index in `attn_processors`, its name, its width C and heads H."""

    index: int
    module: str
    channels: int
    heads: int


def cross_attentions(unet: Outline) -> tuple[CrossAttention, ...]:
    """The UNet's cross-attention layers, in the order of `attn_processors`; self-attentions count in the index."""
    return tuple(
        CrossAttention(index, name, unet.shapes[f"{name}.to_k.weight"][0], heads)
        for index, (name, heads) in enumerate(unet.attentions)
        if name.endswith("attn2")
    )


def check_ip_adapter(
    path: Path, layers: Sequence[CrossAttention], text_width: int, image_width: int, image_encoder: Path
) -> None:
    """Compare an adapter's header with the UNet's layers (keys from tokens `text_width` wide) and the image encoder.

    Raises:
        CheckpointError: another kind of adapter, one of another base model, missing or unexpected tensors, or shapes
            that don't fit.
    """
    found = read_headers(path)
    _check_kind(path, found)
    indices = {match[1] for match in map(_LAYER.fullmatch, found) if match}
    width = sum(next(t for name, t in found.items() if _LAYER.fullmatch(name)).shape[-1:])
    if width != text_width or len(indices) != len(layers):
        raise CheckpointError(
            f"{path}: made for {base_model(width)}: {len(indices)} layers with image tokens {width} wide; the UNet "
            f"has {len(layers)} cross-attention layers with text {text_width} wide"
        )
    expected: dict[str, list[int]] = {
        _PROJECTION[0]: [constants.TOKENS_PER_IMAGE * text_width, image_width],
        _PROJECTION[1]: [constants.TOKENS_PER_IMAGE * text_width],
        _PROJECTION[2]: [text_width],
        _PROJECTION[3]: [text_width],
    }
    for layer in layers:
        expected |= {name: [layer.channels, text_width] for name in _layer_names(layer)}
    if (projection := found.get(_PROJECTION[0])) is not None:
        _check_projection(path, list(projection.shape), expected[_PROJECTION[0]], text_width, image_encoder)
    compare(str(path), "the UNet", expected, found)


def load_ip_adapter(
    path: Path, layers: Sequence[CrossAttention], dtype: "torch.dtype", device: "torch.device | None" = None
) -> IPAdapterWeights:
    """The tensors of a checked adapter in `dtype` on `device`, or else the CPU."""
    tensors = read_tensors(path, dtype, device=device)
    layers_of = tuple(AdapterLayer(layer.module, *(tensors[name] for name in _layer_names(layer))) for layer in layers)
    weight, bias, norm_weight, norm_bias = (tensors[name] for name in _PROJECTION)
    return IPAdapterWeights(weight, bias, norm_weight, norm_bias, layers_of)


def _layer_names(layer: CrossAttention) -> tuple[str, str]:
    return f"ip_adapter.{layer.index}.to_k_ip.weight", f"ip_adapter.{layer.index}.to_v_ip.weight"


def _check_kind(path: Path, found: "Mapping[str, Tensor]") -> None:
    projection = {name.removeprefix("image_proj.") for name in found if name.startswith("image_proj.")}
    layers = [name for name in found if name.startswith("ip_adapter.")]
    if not projection or not layers:
        first = next(iter(found), "none")
        raise CheckpointError(
            f"{path} is no IP-Adapter: it lacks image_proj and ip_adapter parts and begins with {first}; {_EXPECTED}"
        )
    if any("lora" in name for name in layers) or any(name.startswith("perceiver_resampler.") for name in projection):
        raise CheckpointError(f"{path} is a FaceID IP-Adapter (for face recognition embeddings); {_EXPECTED}")
    if "latents" in projection:
        tokens = found["image_proj.latents"].shape[-2]
        raise CheckpointError(f"{path} is an IP-Adapter Plus with {tokens} tokens per image (a resampler); {_EXPECTED}")
    if any(re.match(r"proj\.\d", name) for name in projection):
        kind = "FaceID" if "norm.weight" in projection else "full-face"
        raise CheckpointError(f"{path} is a {kind} IP-Adapter (its image projection has several layers); {_EXPECTED}")
    if not any(_LAYER.fullmatch(name) for name in layers):
        raise CheckpointError(f"{path} has no layers named ip_adapter.<i>.to_k_ip.weight, but {layers[0]}; {_EXPECTED}")


def base_model(width: int) -> str:
    """Whose text is so wide, in words."""
    return {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}.get(width, "another base model")


def _check_projection(path: Path, found: list[int], expected: list[int], width: int, image_encoder: Path) -> None:
    if len(found) == 2 and found[0] != expected[0] and found[0] % width == 0:
        raise CheckpointError(f"{path} makes {found[0] // width} tokens per image; {_EXPECTED}")
    if len(found) == 2 and found[0] == expected[0] and found[1] != expected[1]:
        raise CheckpointError(
            f"{path} takes image embeddings {found[1]} wide, the image encoder in {image_encoder} gives {expected[1]}",
            advice=(
                "give the one that belongs to the adapter with ",
                Field("image_encoder"),
                " (1280: ViT-bigG, 1024: ViT-H)",
            ),
        )
