"""Tiny ControlNets of seeded random weights, and pictures for them."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import nn

from storyadapter.demo.training.networks import randomize


def tiny_controlnet(model: Path, seed: int) -> ControlNetModel:
    """One that fits the UNet of an SDXL folder; its residuals are as large as what they are added to."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    controlnet = ControlNetModel.from_unet(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomize(controlnet)
        for part in controlnet.controlnet_cond_embedding.modules():  # or five layers would hardly tell pictures apart
            if isinstance(part, nn.Conv2d):
                part.weight.data *= 2.5
    return controlnet.eval()


def write_controlnet(model: Path, folder: Path, seed: int = 0) -> Path:
    """The same as a diffusers folder."""
    tiny_controlnet(model, seed).save_pretrained(folder)
    return folder


def poses(count: int, width: int = 64, height: int = 64) -> list[Image.Image]:
    """Pictures on black that are far from each other."""
    pictures = []
    for number in range(count):
        picture = Image.new("RGB", (width, height))
        draw = ImageDraw.Draw(picture)
        across = width * (number + 1) // (count + 1)
        draw.rectangle(
            (across - width // 6, 4, across + width // 6, height - 8 * number), fill=("red", "lime", "blue")[number % 3]
        )
        draw.line((0, height * number // count, width, height // 2), fill="white", width=3)
        pictures.append(picture)
    return pictures
