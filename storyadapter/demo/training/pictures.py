"""What training makes of pictures on its device: latents, redrawings through the VAE, image embeddings."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderKL
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from storyadapter.method.constants import CLIP_PIXELS, REFERENCE_PIXELS


def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents [n, 4, h, w] of pictures uint8 [n, 3, H, W], as the sampler has them."""
    return _in_parts(pictures, lambda part: vae.encode(signed(part)).latent_dist.mean * vae.config.scaling_factor)


def redrawn(
    vae: AutoencoderKL, latents: Tensor, noise: float = 0, autocast: AbstractContextManager[Any] | None = None
) -> Tensor:
    """Latents to pictures uint8 [n, 3, H, W], with up to `noise` of the latents' own spread added."""
    amount = noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    latents = latents + amount * torch.randn_like(latents)
    with autocast or nullcontext():
        return _in_parts(latents / vae.config.scaling_factor, lambda part: _bytes(vae.decode(part).sample.float()))


def embeddings_of(vision: Any, pictures: Tensor) -> Tensor:
    """Image embeddings [n, D] of pictures uint8 [n, 3, 128, 128]."""
    resize = resizer(pictures.device)
    return _in_parts(pictures, lambda part: vision(pixel_values=resize(part.float())).image_embeds)


def signed(pictures: Tensor) -> Tensor:
    """Uint8 0 … 255 to float -1 … 1."""
    return pictures.float() / 127.5 - 1


def _bytes(pictures: Tensor) -> Tensor:
    """Float -1 … 1 to uint8 0 … 255."""
    return (pictures * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def _in_parts(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([function(part) for part in rows.split(512)])


def resizer(device: torch.device) -> Callable[[Tensor], Tensor]:
    """What the method does to a reference, as one matrix per side: 128 → 256 → CLIP's 224, bicubic, normalized."""
    side = torch.eye(128)[None, None]
    for size in (REFERENCE_PIXELS, CLIP_PIXELS):
        side = nnf.interpolate(side, size=(size, 128), mode="bicubic", antialias=True)
    matrix = side[0, 0].to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return lambda pictures: ((matrix @ pictures @ matrix.T).clamp(0, 255) / 255 - mean) / std
