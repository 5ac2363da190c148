"""The random numbers of a story: drawn once, up front, so that a seed means the same on every device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter.method.constants import LATENT_CHANNELS
from storyadapter.method.sampler import SamplerTable


@dataclass(frozen=True, eq=False)
class Noise:
    """Raw (unit variance) noise that every frame of every iteration shares."""

    initial: Tensor  # [1, 4, h, w] fp32; `SamplerTable.initial_latents` scales it
    # [K, 1, 4, h, w] fp32, so that a step counter finds its row, zeros where the sampler adds no noise; [0, 1, 4, h, w]
    # when it adds none in any step
    per_step: Tensor


def draw_noise(seed: int, latent_height: int, latent_width: int, table: SamplerTable) -> Noise:
    """All noise of a story in the order in which diffusers draws it: the initial one, then that of each noisy step.

    Everything is drawn in fp32 from one CPU generator; cast or move it afterwards. `table` tells after which calls
    noise is added.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, LATENT_CHANNELS, latent_height, latent_width)
    initial = torch.randn(shape, generator=generator, dtype=torch.float32)
    noisy = table.noisy_calls
    per_step = torch.zeros(table.calls if noisy else 0, *shape)
    for call in noisy:
        per_step[call] = torch.randn(shape, generator=generator, dtype=torch.float32)
    return Noise(initial, per_step)
