"""How the embedded kernel is launched from inside an engine: its grid and integers over the shapes, in symbols.

Knows no TensorRT: whatever offers `+`, `*` and `//` with integers on the right serves as a symbol.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storyadapter.kernels.grca.aot import EmbeddedKernel, compile_kernel

ELEMENT_TYPES = {"HALF": "fp16", "BF16": "bf16"}  # TensorRT's name → the kernel's


class PluginError(RuntimeError):
    """The kernel can't be embedded for these types or shapes."""


@dataclass(frozen=True)
class Launch:
    """One launch: `grid` and `integers` as symbols or numbers, `integers` in the order of the kernel's arguments."""

    kernel: EmbeddedKernel
    grid: tuple[Any, Any, Any]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: tuple[Any, ...]


def plan_launch(capability: int, dtype: str, letters: Mapping[str, Any]) -> Launch:
    """Compile the kernel for one layer, and say how it is launched.

    Args:
        capability: of the GPU, 10·major + minor.
        dtype: of q, as TensorRT names it.
        letters: B, S, R, T, symbols or numbers; H, D, numbers.

    Raises:
        PluginError: a dtype that isn't half precision, or a layer whose H or D isn't known when the engine is built.
        ValueError, AheadOfTimeError: there is no such kernel.
    """
    if dtype not in ELEMENT_TYPES:
        raise PluginError(f"q is {dtype}; expected {' or '.join(ELEMENT_TYPES)}")
    for name in ("H", "D"):
        if not isinstance(letters[name], int):
            raise PluginError(f"{name} is not known when the engine is built; expected a number")
    kernel = compile_kernel(capability, letters["H"], letters["D"], ELEMENT_TYPES[dtype], letters["T"])
    return Launch(
        kernel=kernel,
        grid=kernel.grid(letters["B"], letters["S"]),
        block=kernel.block,
        shared_bytes=kernel.shared_bytes,
        integers=tuple(kernel.integers(letters["S"], letters["R"], letters["T"]).values()),
    )
