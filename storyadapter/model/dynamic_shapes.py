"""The contract's letters as dynamic dimensions of torch.export."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from storyadapter.model.contract import NetworkSpec, Range
from storyadapter.model.unet import Denoiser

# Latents are exported as multiples of this: the UNet halves them twice.
LATENT_MULTIPLE = 4


def dynamic_shapes(spec: NetworkSpec, module: nn.Module, ranges: Mapping[str, Range]) -> tuple[Any, ...]:
    """The `dynamic_shapes` argument of torch.export for a network of the contract.

    Args:
        spec: the network's inputs.
        module: takes them in the contract's order.
        ranges: of every letter that the inputs have; a letter whose range is one value becomes a constant.
    """
    letters = dict.fromkeys(dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str))
    dims = {letter: _dim(letter, ranges[letter]) for letter in letters}
    free = {letter: dim for letter, dim in dims.items() if dim is not None}
    shapes = tuple(
        {axis: free[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str) and dim in free}
        for tensor in spec.inputs
    )
    # a module with *args sees them as one argument of that name
    positional = 3 if isinstance(module, Denoiser) else len(shapes)
    return shapes[:positional] + ((shapes[positional:],) if positional < len(shapes) else ())


def _dim(name: str, value: Range) -> object | None:
    """A dynamic dimension of torch.export, or None for a constant one."""
    if value.minimum == value.maximum:
        return None
    if name in ("h", "w"):
        low, high = value.minimum // LATENT_MULTIPLE, value.maximum // LATENT_MULTIPLE
        return LATENT_MULTIPLE * torch.export.Dim(f"{name}_quarter", min=low, max=high)
    return torch.export.Dim(name, min=value.minimum, max=value.maximum)
