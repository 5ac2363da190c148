"""The contract's letters as dynamic dimensions of torch.export."""

import inspect
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

import torch
from torch import nn

from storyadapter.model.contract import NetworkSpec, Range, TensorSpec, split_dim

# Latents are exported as multiples of this: the UNet halves them twice.
LATENT_MULTIPLE: Final = 4
_LATENT_SIZES: Final = ("h", "w")


def least_factors(spec: NetworkSpec) -> dict[str, Fraction]:
    """Of each letter in a network's inputs, the smallest multiple of it that is a dimension."""
    found: dict[str, Fraction] = {}
    for factor, letter in (split_dim(dim) for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)):
        found[letter] = min(factor, found.get(letter, factor))
    return found


def dynamic_shapes(spec: NetworkSpec, module: nn.Module, ranges: Mapping[str, Range]) -> tuple[Any, ...]:
    """The `dynamic_shapes` argument of torch.export for a network of the contract.

    Args:
        spec: the network's inputs.
        module: takes them in the contract's order.
        ranges: of every letter that the inputs have; a letter whose range is one value becomes a constant.
    """
    free: dict[str, Any] = {}
    steps = dict.fromkeys(_LATENT_SIZES, Fraction(LATENT_MULTIPLE))  # that a free dimension counts in
    for letter, factor in least_factors(spec).items():
        # a compiler takes a letter of 1 for a constant, though 77 of it are none: so T = 77·M is free itself
        step = steps.setdefault(letter, 1 / factor)
        low, high = ranges[letter].minimum, ranges[letter].maximum
        if low < high:
            free[letter] = torch.export.Dim(f"{letter}_free", min=int(low / step), max=int(high / step))

    def axes(tensor: TensorSpec) -> dict[int, Any]:
        found = {}
        for axis, dim in enumerate(tensor.shape):
            factor, letter = split_dim(dim) if isinstance(dim, str) else (0, "")
            if letter in free:
                times = int(factor * steps[letter])
                found[axis] = free[letter] if times == 1 else times * free[letter]
        return found

    shapes = tuple(map(axes, spec.inputs))
    # a module with *args sees them as one argument of that name
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    return shapes[:named] + ((shapes[named:],) if named < len(shapes) else ())
