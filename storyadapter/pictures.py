"""Latents to pictures, and pictures to what the image encoder reads."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from storyadapter import method
from storyadapter.networks import Networks


def decode_latents(networks: Networks, latents: Tensor) -> Tensor:
    """Latents [F, 4, h, w] fp32 as the sampler leaves them → pictures [F, 3, 8h, 8w] fp32 on the CPU, about -1 to 1."""
    return networks.vae_decoder({"latents": latents.to(networks.vae_dtype)})["image"].float().cpu()


def to_pictures(image: Tensor) -> list[Image.Image]:
    """[F, 3, height, width] fp32, -1 to 1, on the CPU → RGB pictures, rounded as diffusers rounds."""
    array = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(frame) for frame in array]


def embed_pictures(networks: Networks, pictures: Sequence[Image.Image]) -> Tensor:
    """CLIP embeddings [N, width] in the engine's dtype, each picture encoded once.

    Every picture is resized to 256×256 with Pillow's default filter and then preprocessed by CLIP's own defaults, as
    published. The Pillow implementation is taken by name: another one would resample differently.
    """
    processor = CLIPImageProcessorPil()
    square = (method.REFERENCE_PIXELS, method.REFERENCE_PIXELS)
    limit = networks.letters["F"].maximum if networks.letters else len(pictures)
    embeddings = []
    for start in range(0, len(pictures), limit):
        resized = [picture.convert("RGB").resize(square) for picture in pictures[start : start + limit]]
        pixels = processor(resized, return_tensors="pt").pixel_values
        inputs = {"pixels": pixels.to(networks.device, networks.dtype).contiguous()}
        embeddings.append(networks.image_encoder(inputs)["image_embedding"].clone())
    return torch.cat(embeddings)
