"""Tiny VAEs of seeded random weights for pictures that only become references."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import nn


def tiny_reference_vae(seed: int = 0, **config: object) -> AutoencoderTiny:
    """One of four levels, whose pictures depend on the latents as much as those of a trained one."""
    sizes = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1, 1, 1, 1) for part in ("encoder", "decoder")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(**(sizes | blocks | config)).eval()
        for part in vae.decoder.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
        vae.decoder.layers[-1].weight.data /= 8  # or most pixels would be black or white
        vae.decoder.layers[-1].bias.data += 0.7
    return vae


def write_reference_vae(folder: Path, seed: int = 0, **config: object) -> Path:
    """The same as a diffusers folder."""
    tiny_reference_vae(seed, **config).save_pretrained(folder)
    return folder
