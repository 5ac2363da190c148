"""The networks of the contract as PyTorch modules, made from a checkpoint.

Each module's `forward` takes the contract's inputs in order and gives the contract's outputs in order: eager runs
them, the exporters export them, and nothing else knows how a network is computed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn

from storyadapter.model.contract import Geometry, control_embedding_name, control_projection_name, controlnet_name
from storyadapter.model.controlnet import split_controlnet
from storyadapter.model.grca import GrcaFunction
from storyadapter.model.ip_adapter import IPAdapterWeights
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import Numerics
from storyadapter.model.unet import split_unet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny


def model_parts(geometry: Geometry) -> dict[str, tuple[str, ...]]:
    """The parts of a model with their own weights, and the networks of the contract that are made of each.

    A part runs in the precision of the last of its networks.
    """
    controls = range(len(geometry.controls))
    names = {controlnet_name(i): (control_embedding_name(i), control_projection_name(i)) for i in controls}
    return {
        **{encoder: (encoder,) for encoder in ("text_encoder", "text_encoder_2", "image_encoder")},
        **{controlnet: (*others, controlnet) for controlnet, others in names.items()},
        "unet": ("text_projection", "reference_projection", "denoiser"),
        "vae": ("vae_decoder",),
        **({"reference_vae": ("reference_decoder",)} if geometry.reference_vae else {}),
    }


class ModelParts(Protocol):
    """What the networks are made from: an opened `Checkpoint`, or a model made otherwise.

    Each method gives a fresh copy of its part in `dtype`, ready for inference, on `device` or where the model has it.
    """

    @property
    def geometry(self) -> Geometry: ...

    @property
    def rewrites(self) -> Mapping[str, Callable[[nn.Module], None]]:
        """By network, what rewrites it in place when it is loaded: quantizes it, say."""
        ...

    def load(self, part: str, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        """A network of diffusers or transformers, by its name in `model_parts`."""
        ...

    def load_ip_adapter(self, dtype: torch.dtype, device: torch.device | None = None) -> IPAdapterWeights: ...


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class TextEncoder(_Encoder):
    """CLIP text model → penultimate hidden states."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [P, T] int32 → text_embedding [P, T, width]."""
        return self.model(input_ids, output_hidden_states=True).hidden_states[-2]


class TextEncoder2(_Encoder):
    """CLIP text model with projection → penultimate hidden states and pooled text."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [P, T] int32 → text_embedding_2 [P, T, width], pooled_text [P, pooled width]."""
        out = self.model(input_ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class ImageEncoder(_Encoder):
    """CLIP vision model with projection → image embedding."""

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [F, 3, 224, 224], CLIP-normalized → image_embedding [F, width]."""
        return self.model(pixels).image_embeds


class VaeDecoder(nn.Module):
    """The VAE's decoder, including the step from the sampler's latents to the VAE's.

    One that says `force_upcast` and is to run in fp16 gets smaller activations, in place; see `vae_scaling`.
    """

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        if vae.config.force_upcast and vae.dtype == torch.float16:
            from storyadapter.model.vae_scaling import (
                divide_activations,
            )  # imports diffusers, which a run can do without

            divide_activations(self.decoder)
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """latents [F, 4, h, w] as the sampler leaves them → image [F, 3, 8h, 8w], about -1 to 1."""
        z = _unscaled(latents, self.scaling_factor)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


class ReferenceDecoder(nn.Module):
    """A tiny VAE's decoder, whose pictures only become references, including the step from the sampler's latents."""

    def __init__(self, vae: "AutoencoderTiny") -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """latents [F, 4, h, w] as the sampler leaves them → image [F, 3, 8h, 8w], about -1 to 1."""
        return self.decoder(_unscaled(latents, self.scaling_factor))


def _unscaled(latents: Tensor, factor: float) -> Tensor:
    # in fp32: an exported file would hold the factor in the network's own type, 0.3 % off in bf16
    return (latents.float() / factor).to(latents.dtype)


# of the parts that aren't taken apart
_MODULES: Final = {
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder2,
    "image_encoder": ImageEncoder,
    "vae_decoder": VaeDecoder,
    "reference_decoder": ReferenceDecoder,
}


def iterate_modules(
    checkpoint: ModelParts,
    numerics: Numerics,
    grca: GrcaFunction,
    only: Collection[str] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """The modules by their contract names, loaded one checkpoint component at a time.

    A caller that drops each module before it asks for the next holds at most one component in memory; the three
    parts of the UNet, or of a ControlNet, come together. LoRAs are fused by the checkpoint.

    Args:
        grca: the attention function of the denoiser's cross-attention layers.
        only: names of the modules to be had; components that none of them needs aren't loaded. None for all.
        device: where the weights are loaded to; by default the CPU.
    """

    def wanted(name: str) -> bool:
        return only is None or name in only

    for part, names in model_parts(checkpoint.geometry).items():
        if not any(map(wanted, names)):
            continue
        modules = _modules_of(checkpoint, part, TORCH_DTYPES[numerics[names[-1]]], grca, device)
        for name in tuple(modules):  # taken out one by one: what a suspended generator names would stay in memory
            if wanted(name):
                if name in checkpoint.rewrites:
                    checkpoint.rewrites[name](modules[name])
                yield name, modules.pop(name).eval()
            else:
                del modules[name]


def _modules_of(
    checkpoint: ModelParts, part: str, dtype: torch.dtype, grca: GrcaFunction, device: torch.device | None
) -> dict[str, nn.Module]:
    loaded = checkpoint.load(part, dtype, device)
    if part == "unet":
        return split_unet(loaded, checkpoint.load_ip_adapter(dtype, device), grca)
    if part.startswith("controlnet_"):
        return split_controlnet(loaded, int(part.rpartition("_")[2]))
    return {name: _MODULES[name](loaded) for name in model_parts(checkpoint.geometry)[part]}
