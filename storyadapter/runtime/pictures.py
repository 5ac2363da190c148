"""Latents to pictures, and pictures to what the image encoder reads."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storyadapter.method import constants
from storyadapter.model.networks import Networks


def decode_latents(networks: Networks, latents: Tensor, decoder: str = "vae_decoder") -> tuple[Tensor, Tensor]:
    """Latents as the sampler leaves them → the bytes of pictures, all on the networks' device.

    Args:
        networks: of which the decoder is used.
        latents: [F, 4, h, w] fp32.
        decoder: one of `contract.DECODERS`.

    Returns:
        [F, 8h, 8w, 3] uint8, rounded as diffusers rounds; and [F, 2] bool: whether a frame's latents are finite, and
        whether its picture is.
    """
    image = networks[decoder]({"latents": latents.to(networks.dtype(decoder))})["image"].float()
    finite = torch.stack([values.isfinite().flatten(1).all(1) for values in (latents, image)], dim=1)
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), finite


def to_picture(pixels: Tensor) -> Image.Image:
    """[height, width, 3] uint8 on the CPU → an RGB picture of its own memory."""
    return Image.fromarray(pixels.numpy())


def clip_pixels(picture: Image.Image) -> Tensor:
    """What the image encoder reads of a picture: [3, 224, 224] fp32 on the CPU.

    The picture is resized to 256×256 with Pillow's default filter and then preprocessed by CLIP's own defaults, as
    published: to the bit as transformers' `CLIPImageProcessorPil` does it, whose import takes seconds.
    """
    square = picture.convert("RGB").resize((constants.REFERENCE_PIXELS,) * 2)
    small = np.asarray(square.resize((constants.CLIP_PIXELS,) * 2, Image.Resampling.BICUBIC))
    mean, spread = (np.array(values, np.float32) for values in (constants.CLIP_MEAN, constants.CLIP_STD))
    normalized = ((small * (1 / 255)).astype(np.float32) - mean) / spread
    return torch.from_numpy(normalized.transpose(2, 0, 1).copy())


def embed_pixels(networks: Networks, pixels: Tensor) -> Tensor:
    """[F, 3, 224, 224] fp32, on the CPU or already on the device → CLIP embeddings [F, width] in the engine's dtype."""
    pixels = pixels.to(networks.device, non_blocking=True).to(networks.dtype("denoiser"))
    return networks["image_encoder"]({"pixels": pixels})["image_embedding"].clone()


def embed_pictures(
    networks: Networks, pictures: Sequence[Image.Image], batches: Sequence[range] | None = None
) -> Tensor:
    """CLIP embeddings [N, width] in the engine's dtype, each picture encoded once.

    Args:
        batches: which pictures go into one call; by default as many as the engine takes.
    """
    limit = networks.letters["F"].maximum if networks.letters else len(pictures)
    if batches is None:
        batches = [range(len(pictures))[start : start + limit] for start in range(0, len(pictures), limit)]
    return torch.cat(
        [embed_pixels(networks, torch.stack([clip_pixels(pictures[index]) for index in batch])) for batch in batches]
    )
