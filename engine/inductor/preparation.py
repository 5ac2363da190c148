"""A module in the form that is compiled: rewritten, its weights in the layouts in which compiled code reads them."""

import torch
from torch import Tensor, nn

from storyadapter.engine.inductor.fusion import fuse_denoiser
from storyadapter.engine.inductor.operators import Operators
from storyadapter.engine.inductor.shapes import channels_last
from storyadapter.model.unet import Denoiser


def prepare(module: nn.Module, operators: Operators, device: torch.device) -> dict[str, Tensor]:
    """Bring a module of the contract into the form that is compiled for `device`, in place.

    Returns:
        Its parameters and buffers by name: the weights that a package reads, of this model or another of its kind.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # as of a checkpoint saved by pickle, which keeps strides
    if isinstance(module, Denoiser):
        fuse_denoiser(module, operators)
    if device.type == "cuda":
        channels_last(module)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}
