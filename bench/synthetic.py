"""A full-size SDXL denoiser of random weights: what sizes, times and memory depend on, without a checkpoint."""

import math
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from storyadapter.contract import Geometry, LayerWidth, Precision
from storyadapter.grca import GrcaFunction, grca
from storyadapter.networks import TORCH_DTYPES
from storyadapter.unet import Denoiser, GlobalReferenceCrossAttention

# The published configuration of SDXL base 1.0's UNet, what differs from diffusers' defaults.
# Source: huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
SDXL_UNET: Final[dict[str, Any]] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_GEOMETRY: Final = Geometry(
    widths=(LayerWidth(640, 10, 10), LayerWidth(1280, 60, 20)),
    time_embedding=1280,
    text_width=768,
    text_width_2=1280,
    pooled_width=1280,
    image_embedding_width=1280,
    sample_size=128,
)


def sdxl_denoiser(precision: Precision, seed: int = 0, attention: GrcaFunction = grca) -> Denoiser:
    """The contract's denoiser at SDXL's size, on the CPU, with seeded weights that keep activations in a sane range.

    No weight is ever held in another precision, nor are the layers held that the denoiser doesn't have.
    """
    denoiser = sdxl_structure(attention)
    nn.Module.to(denoiser, TORCH_DTYPES[precision])
    denoiser.to_empty(device="cpu")
    _fill(denoiser, seed)
    return denoiser.eval()


def sdxl_structure(attention: GrcaFunction = grca) -> Denoiser:
    """The denoiser at SDXL's size without any weights, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
        counts = dict.fromkeys((width.channels for width in SDXL_GEOMETRY.widths), 0)
        for name in [name for name in unet.attn_processors if name.endswith("attn2.processor")]:
            block = unet.get_submodule(name.removesuffix(".attn2.processor"))
            layer = GlobalReferenceCrossAttention(block.attn2, counts[block.attn2.inner_dim], attention)
            counts[layer.channels] += 1
            block.attn2 = layer
        denoiser = Denoiser(unet, tuple(counts))
    assert all(counts[width.channels] == width.layers for width in SDXL_GEOMETRY.widths)
    return denoiser


@torch.no_grad()
def _fill(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                weight.fill_(1.0 if name == "weight" else 0.0)
            elif name == "bias":
                weight.zero_()
            else:
                weight.normal_(std=1 / math.sqrt(math.prod(weight.shape[1:])), generator=generator)
