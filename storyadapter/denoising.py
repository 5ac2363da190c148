"""The denoising loop of one micro-batch: UNet call, guidance, sampler step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from storyadapter.conditioning import BoundText
from storyadapter.contract import ref_kv_name, text_kv_name
from storyadapter.networks import Networks
from storyadapter.noise import Noise
from storyadapter.reference_bank import ReferenceBank
from storyadapter.sampler import SamplerTable, scale_input, step, timestep_at


def denoise(
    networks: Networks,
    text: BoundText,
    bank: ReferenceBank,
    table: SamplerTable,
    noise: Noise,
    *,
    frames: int,
    guidance: float,
) -> Iterator[Tensor]:
    """Draw the latents of one micro-batch; yields the state after each step, so that a caller can tell progress.

    Args:
        text: bound text of these frames, unconditional rows first where guidance is above 1.
        bank: references of this iteration.
        table, noise: of the sampler; the noise is shared by all frames.
        frames: F.
        guidance: classifier-free guidance.

    Yields:
        [F, 4, h, w] fp32, once per UNet call; the last one is the result.
    """
    guided = guidance > 1
    device, dtype = networks.device, networks.dtype
    coefficients = table.coefficients(device)
    fixed = {
        "added_embedding": text.added_embedding,
        "text_row": text.text_row,
        "ref_row": bank.rows(frames, guided),
        "ref_length": bank.ref_length,
    }
    fixed |= {text_kv_name(channels): kv for channels, kv in text.text_kv.items()}
    fixed |= {ref_kv_name(channels): kv for channels, kv in bank.ref_kv.items()}
    rows = 2 * frames if guided else frames
    x = table.initial_latents(noise.initial).to(device).expand(frames, -1, -1, -1).contiguous()
    per_step = noise.per_step.to(device)
    x0 = torch.zeros_like(x)
    for call in range(table.calls):
        index = torch.full((1,), call, dtype=torch.int64, device=device)
        latents = scale_input(coefficients, index, x).to(dtype)
        latents = torch.cat((latents, latents)) if guided else latents
        timestep = timestep_at(coefficients, index).expand(rows).contiguous()
        output = networks.denoiser({"latents": latents, "timestep": timestep, **fixed})["noise"].float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        fresh = per_step[call] if len(per_step) else None
        x, x0 = step(coefficients, index, x, output, x0, fresh)
        yield x
