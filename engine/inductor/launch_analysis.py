"""PyTorch's analysis of what a Triton kernel writes, made once per kernel instead of four times per launch.

A compiler must know which arguments a kernel writes. PyTorch finds out by lowering the kernel's source to Triton's
intermediate language and walking it, and forgets the answer at once. The full-size denoiser has 350 launches of three
kernels: the analyses took 45 % of the 300 s in which it was compiled. No option of PyTorch 2.11 to 2.13 keeps them, so
a process that does nothing but compile does it here, and only while it compiles.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

import sympy
import torch
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.ir import TensorBox

# What it is called in PyTorch 2.11 and from 2.12 on. Where it has another name, each launch is analysed, as ever.
ANALYSES: Final = ("identify_mutated_tensors", "identify_accessed_tensors")


@contextlib.contextmanager
def analysed_once() -> Iterator[None]:
    """Inside, launches that differ in nothing that the analysis reads share one."""
    names = [name for name in ANALYSES if hasattr(triton_kernel_wrap, name)]
    originals = {name: getattr(triton_kernel_wrap, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(triton_kernel_wrap, name, _remembering(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(triton_kernel_wrap, name, original)


def _remembering(analyse: Any) -> Any:
    known: dict[Any, Any] = {}

    def remembered(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Mapping[str, Any]) -> Any:
        # a launch that says its number of warps has a tuner of its own around the kernel, with that one configuration
        configs = getattr(kernel, "configs", ())
        function = kernel.fn if configs else kernel
        fixed = configs[0].kwargs if configs else {}
        # the function itself is part of the key, so that it lives as long as what is known of it
        key = (function, launch_key({**kwargs, **fixed}, tma_descriptor_metadata))
        if key not in known:
            known[key] = analyse(kernel, kwargs, tma_descriptor_metadata)
        return copy.copy(known[key])

    return remembered


def launch_key(kwargs: Mapping[str, Any], tma_descriptor_metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the analysis reads of a launch: names, dtypes, descriptors, and the values of all that isn't symbolic."""
    return (
        tuple((name, _read_of(value)) for name, value in kwargs.items()),
        tuple((name, repr(value)) for name, value in tma_descriptor_metadata.items()),
    )


def _read_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", value.dtype)
    if isinstance(value, TensorBox):
        return ("tensor", value.get_dtype())
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return ("symbol",)  # the analysis puts the same number in place of each
    return (type(value), repr(value))
