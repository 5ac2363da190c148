"""Which tiles the kernels run with: data chosen once by measurement (`bench.tune`) and stored in `tiles.json`.

The file holds, by kernel, by architecture (`sm_90`, …, or `untuned` for all others) and by key, the fields of the
kernel's class of tiles. A key is the element size and the width that the tiles depend on (`16-bit/D=64`), or, under
`untuned`, the element size alone. Tiles never depend on the number of rows, prompts or references, so that no shape of
a run and no symbolic shape of a compiler leads to another compilation. Nothing is tuned in a user's run. This module
imports neither Triton nor PyTorch.
"""

import functools
import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Final, Generic, TypeVar

# Fields of tiles that are the compiler's options, with its own names; the others are compile-time arguments.
_OPTIONS: Final = {"num_warps": "num_warps", "num_stages": "num_stages", "max_registers": "maxnreg"}


@dataclass(frozen=True)
class Tiles:
    """Compile-time choices of one build of a kernel; the classes of the kernels list them."""

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments that are tiles."""
        names = (field.name for field in fields(self))
        return {name.upper(): getattr(self, name) for name in names if name not in _OPTIONS}

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        found = {option: getattr(self, name, None) for name, option in _OPTIONS.items()}
        return {option: value for option, value in found.items() if value is not None}


@dataclass(frozen=True)
class GrcaTiles(Tiles):
    """Tiles of `grca_kernel`."""

    block_m: int  # queries of a tile; a power of two, at least 16
    block_n: int  # reference tokens of a block; a power of two, at least 16
    tiles: int  # tiles that one program takes one after the other, keeping what they share in shared memory
    num_warps: int  # warps of a program
    num_stages: int  # blocks of reference tokens in flight (1: no pipelining)
    prefetch: bool  # reads the next tile's queries while this one is computed
    heads_first: bool  # neighbouring programs take neighbouring heads (else neighbouring queries of one head)
    # cap on the registers of a thread; None leaves it to the assembler. torch.compile ignores it
    max_registers: int | None = None


@dataclass(frozen=True)
class GegluTiles(Tiles):
    """Tiles of `geglu_kernel`."""

    block_m: int  # rows of x in a tile; a power of two, at least 16
    block_n: int  # columns of the product in a tile, twice the outputs; a power of two, at least 16
    block_k: int  # depth of one step; a power of two, at least 16
    group_m: int  # blocks of rows that are walked together
    num_warps: int  # warps of a program
    num_stages: int  # steps in flight
    persistent: bool  # as many programs as multiprocessors, each taking many tiles
    descriptors: bool  # loads by the tensor memory accelerator (compute capability 9.0 and later)


@dataclass(frozen=True)
class ProductTiles(Tiles):
    """Tiles of `product_fp8_kernel`."""

    block_h: int  # rows of pixels in a tile; 1 for linear layers
    block_w: int  # pixels of a row, or rows of a linear layer's input; block_h · block_w: a power of two from 16 on
    block_n: int  # columns of the product in a tile; a power of two, at least 16
    block_k: int  # depth of one step; a power of two, at least 32
    group_m: int  # tiles of pixels that are walked together
    num_warps: int  # warps of a program
    num_stages: int  # steps in flight
    persistent: bool  # as many programs as multiprocessors, each taking many tiles
    descriptors: bool  # loads by the tensor memory accelerator (compute capability 9.0 and later)


@dataclass(frozen=True)
class GroupNormTiles(Tiles):
    """Tiles of the three kernels of a group norm."""

    rows: int  # pixels that one program reads at a time; a power of two
    steps: int  # how many times it does, for the moments
    block_c: int  # channels of a program; a power of two
    num_warps: int  # warps of a program


@dataclass(frozen=True)
class LayerNormTiles(Tiles):
    """Tiles of `add_layer_norm_kernel`."""

    rows: int  # rows of a program; a power of two
    num_warps: int  # warps of a program


KernelTiles = TypeVar("KernelTiles", bound=Tiles)


@dataclass(frozen=True)
class TileTable(Generic[KernelTiles]):
    """The stored tiles of one kernel."""

    kernel: str  # its name in `tiles.json`
    kind: type[KernelTiles]  # the class of its tiles
    letter: str  # of the width that they depend on

    def key(self, element_bytes: int, width: int) -> str:
        """Under which the tiles of one element size and width are stored."""
        return f"{8 * element_bytes}-bit/{self.letter}={width}"

    def choose(self, capability: int, element_bytes: int, width: int) -> tuple[KernelTiles, bool]:
        """The stored tiles for one target, and whether they were measured there or are a safe default.

        Args:
            capability: compute capability, 10·major + minor: 80, 89, 90, 100, 120; 0 for none.
            element_bytes: 1 for fp8, 2 for fp16 and bf16, 4 for fp32.
            width: D of GRCA, K of the GEGLU, C of the layer norm, …

        Raises:
            KeyError: the table holds no tiles for the width or the element size.
        """
        return _choose(self, capability, element_bytes, width)


@functools.cache
def _choose(table: TileTable[Any], capability: int, element_bytes: int, width: int) -> tuple[Any, bool]:
    entries, key = stored()[table.kernel], table.key(element_bytes, width)
    tuned = entries.get(f"sm_{capability}", {}).get(key)
    if tuned is not None:
        return table.kind(**tuned), True
    untuned = entries["untuned"]
    return table.kind(**(untuned[key] if key in untuned else untuned[key.partition("/")[0]])), False


@functools.cache
def stored() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """What `tiles.json` holds: fields of tiles by kernel, architecture and key."""
    return json.loads(resources.files("storyadapter.kernels").joinpath("tiles.json").read_text(encoding="utf-8"))


GRCA: Final = TileTable("grca", GrcaTiles, "D")
# Tiles whose shared memory is at most 48 KB, the most that a launch gets without asking for more.
GRCA_EMBEDDED: Final = TileTable("grca_embedded", GrcaTiles, "D")
GEGLU: Final = TileTable("geglu", GegluTiles, "K")
LAYER_NORM: Final = TileTable("layer_norm", LayerNormTiles, "C")
CONVOLUTION_FP8: Final = TileTable("convolution_fp8", ProductTiles, "N")
LINEAR_FP8: Final = TileTable("linear_fp8", ProductTiles, "K")
GEGLU_FP8: Final = TileTable("geglu_fp8", ProductTiles, "K")
GROUP_NORM: Final = TileTable("group_norm", GroupNormTiles, "C")
TABLES: Final = (GRCA, GRCA_EMBEDDED, GEGLU, LAYER_NORM, CONVOLUTION_FP8, LINEAR_FP8, GEGLU_FP8, GROUP_NORM)
