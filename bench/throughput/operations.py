"""Floating-point operations of one UNet call: what the model asks for, however a path computes it."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from storyadapter.method import constants
from storyadapter.model.networks import Networks, idle_inputs


def attended_keys(frames: int, references: int) -> int:
    """Text and reference keys of all rows of a call: an unconditional row needs 4 reference tokens, others all."""
    unconditional = constants.TEXT_TOKENS + constants.TOKENS_PER_IMAGE
    conditional = constants.TEXT_TOKENS + constants.TOKENS_PER_IMAGE * references
    return frames * (unconditional + conditional)


def _attention_operations(q_shape: torch.Size, k_shape: torch.Size, *shapes: Any, **named: Any) -> int:
    batch, heads, queries, head_size = q_shape
    return 4 * batch * heads * queries * k_shape[2] * head_size


def count_operations(networks: Networks, frames: int, references: int, height: int, width: int) -> int:
    """Operations (a multiplication and an addition are two) of one call of the denoiser with 2·`frames` rows.

    Counted by `torch.utils.flop_counter` on one call of the eager denoiser: matrix products, convolutions and
    self-attentions. Its global reference cross-attentions are added as 4·S·C operations per attended key, S queries of
    width C: the two products of each attention. Elementwise work isn't counted.

    Args:
        networks: eager ones, whose denoiser computes the operator `storyadapter::grca`; a meta device will do.
        frames: F of the call.
        references: N, all of which the conditional rows attend to.
        height, width: of the pictures, in pixels.
    """
    scale = networks.geometry.pixels_per_latent
    letters = {
        "B": 2 * frames,
        "P": frames + 1,
        "G": 2,
        "R": constants.TOKENS_PER_IMAGE * references,
        "h": height // scale,
        "w": width // scale,
    }
    keys = attended_keys(frames, references)

    def grca_operations(q_shape: torch.Size, *shapes: Any, out_shape: Any = None, **named: Any) -> int:
        _, queries, heads, head_size = q_shape
        return 4 * queries * heads * head_size * keys

    inputs = idle_inputs(networks, "denoiser", letters)
    mapping = {
        torch.ops.storyadapter.grca: grca_operations,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,  # unknown to it
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        networks["denoiser"](inputs)
    return counter.get_total_flops()
