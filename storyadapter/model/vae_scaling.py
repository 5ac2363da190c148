"""A VAE's decoder whose activations are a power of two smaller, so that they fit into fp16; what it computes stays.

Published SDXL's VAE says `force_upcast`, as its activations overflow fp16. All of what grows there lies between two
group norms, which don't see the scale of their input (given ε in proportion): the stream of residuals, and what the
first convolution of a block gives. So the layers that write these are divided, and the norms that read them get a
smaller ε. In real numbers nothing changes; powers of two round no weight but those that become subnormal.
"""

from typing import Final

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

DIVISOR: Final = 16  # activations up to a million fit


@torch.no_grad()
def divide_activations(decoder: Decoder, divisor: int = DIVISOR) -> None:
    """Divide the activations of a decoder by a power of two, in place."""
    _divide(decoder.conv_in, divisor)
    for part in decoder.modules():
        if isinstance(part, ResnetBlock2D):
            for norm in (part.norm1, part.norm2):
                norm.eps /= divisor**2
            _divide(part.conv1, divisor)  # what they read is normalized anew
            _divide(part.conv2, divisor)
            if part.conv_shortcut is not None:
                _divide(part.conv_shortcut, divisor, weight=False)  # what it reads is divided already
        elif isinstance(part, Attention):
            part.group_norm.eps /= divisor**2
            _divide(part.to_out[0], divisor)
        elif isinstance(part, Upsample2D) and part.conv is not None:
            _divide(part.conv, divisor, weight=False)
    decoder.conv_norm_out.eps /= divisor**2


def _divide(layer: nn.Conv2d | nn.Linear, divisor: int, weight: bool = True) -> None:
    if weight:
        layer.weight /= divisor
    if layer.bias is not None:
        layer.bias /= divisor
