"""The sizes that a package is compiled for, and how a call of another size is brought to them.

A compiler takes a size of 1 for a constant, so letters that are dynamic sizes start at 2, and a call with 1 is doubled
and its result cut; M, of which 77 are a size, starts at 1. The VAE's decoder is compiled for one frame: one already
fills a GPU, and memory for more buys nothing; likewise the reference VAE's.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from storyadapter.model.contract import DECODERS, NetworkSpec, Range, TensorSpec, split_dim
from storyadapter.model.dynamic_shapes import least_factors

_ROWS_ASKED_FOR = 16  # of a convolution on a CPU, by PyTorch's choice of who computes it


def compiled_ranges(spec: NetworkSpec, letters: Mapping[str, Range]) -> dict[str, Range]:
    """The range that each letter of a network's inputs is compiled for."""
    ranges = {}
    for name, factor in sorted(least_factors(spec).items()):
        value = letters[name]
        if name == "F" and spec.name in DECODERS:
            ranges[name] = Range(1, 1)
        elif factor > 1:
            ranges[name] = value
        else:
            ranges[name] = Range(max(value.minimum, min(2, value.maximum)), value.maximum)
    return ranges


def example_sizes(ranges: Mapping[str, Range], device: torch.device) -> dict[str, int]:
    """The sizes that the compiler sees: the largest, which is what a story is drawn with, but few bank rows.

    On a CPU PyTorch asks whether a convolution has 16 rows or more, and holds the example's answer to be true of every
    size: with 16 rows of at most 16 it would compile for nothing else. So there the example has fewer.
    """
    sizes = {name: 2 if name == "G" else value.maximum for name, value in ranges.items()}
    if device.type == "cpu" and "B" in sizes:
        sizes["B"] = min(sizes["B"], _ROWS_ASKED_FOR - 1)
    return sizes


def doubled(spec: NetworkSpec, tensors: Sequence[Tensor], letters: Sequence[str]) -> list[Tensor]:
    """Inputs of a network with what is 1 in these letters repeated to 2; the rest as they are."""
    result = []
    for tensor, value in zip(spec.inputs, tensors, strict=True):
        repeats = [2 if isinstance(dim, str) and split_dim(dim)[1] in letters else 1 for dim in tensor.shape]
        result.append(value.repeat(repeats) if 2 in repeats else value)
    return result


def cut(tensor: TensorSpec, value: Tensor, letters: Sequence[str]) -> Tensor:
    """An output of doubled inputs, without what the doubling added."""
    for axis, dim in enumerate(tensor.shape):
        if isinstance(dim, str) and split_dim(dim)[1] in letters:
            value = value.narrow(axis, 0, value.shape[axis] // 2)
    return value
