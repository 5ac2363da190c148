"""The contract's letters as dynamic dimensions of torch.export."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from storyadapter.model.contract import NetworkSpec, Range, TensorSpec, split_dim

# Latents are exported as multiples of this: the UNet halves them twice.
LATENT_MULTIPLE: Final = 4
_LATENT_SIZES: Final = ("h", "w")


def dynamic_shapes(spec: NetworkSpec, module: nn.Module, ranges: Mapping[str, Range]) -> tuple[Any, ...]:
    """The `dynamic_shapes` argument of torch.export for a network of the contract.

    Args:
        spec: the network's inputs.
        module: takes them in the contract's order.
        ranges: of every letter that the inputs have; a letter whose range is one value becomes a constant.
    """
    free: dict[str, Any] = {}
    for letter in {split_dim(dim)[1] for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)}:
        low, high = ranges[letter].minimum, ranges[letter].maximum
        if low < high and letter in _LATENT_SIZES:
            low, high = low // LATENT_MULTIPLE, high // LATENT_MULTIPLE
            free[letter] = torch.export.Dim(f"{letter}_quarter", min=low, max=high)
        elif low < high:
            free[letter] = torch.export.Dim(letter, min=low, max=high)

    def axes(tensor: TensorSpec) -> dict[int, Any]:
        found = {}
        for axis, dim in enumerate(tensor.shape):
            factor, letter = split_dim(dim) if isinstance(dim, str) else (0, "")
            if letter in free:
                times = int(factor * (LATENT_MULTIPLE if letter in _LATENT_SIZES else 1))
                found[axis] = free[letter] if times == 1 else times * free[letter]
        return found

    shapes = tuple(map(axes, spec.inputs))
    # a module with *args sees them as one argument of that name
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    return shapes[:named] + ((shapes[named:],) if named < len(shapes) else ())
