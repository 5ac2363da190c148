"""Which tiles the GEGLU and the layer norm run with: data as in `tiles.py`, stored in `mlp_tiles.json`.

Tiles depend on the architecture, the dtype and the width (K or C); never on M, so that no shape of a run leads to
another compilation. Nothing is tuned in a user's run. This module imports neither Triton nor PyTorch.
"""

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class GegluTiles:
    """Compile-time choices of one build of `geglu_kernel`.

    Attributes:
        block_m: rows of x in a tile; a power of two, at least 16.
        block_n: columns of the product in a tile, twice the outputs; a power of two, at least 16.
        block_k: depth of one step; a power of two, at least 16.
        group_m: blocks of rows that are walked together.
        num_warps: warps of a program.
        num_stages: steps in flight.
        persistent: as many programs as multiprocessors, each taking many tiles.
        descriptors: loads by the tensor memory accelerator (compute capability 9.0 and later).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    persistent: bool
    descriptors: bool

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments that are tiles."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "PERSISTENT": self.persistent,
            "DESCRIPTORS": self.descriptors,
        }

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LayerNormTiles:
    """Compile-time choices of one build of `add_layer_norm_kernel`.

    Attributes:
        rows: rows of a program; a power of two.
        num_warps: warps of a program.
    """

    rows: int
    num_warps: int

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments that are tiles."""
        return {"ROWS": self.rows}

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return {"num_warps": self.num_warps}


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("storyadapter.kernels").joinpath("mlp_tiles.json").read_text(encoding="utf-8"))


def _choose(capability: int, kernel: str, bits: int, width: str) -> tuple[dict[str, Any], bool]:
    table = _table()
    tuned = table["tuned"].get(f"sm_{capability}", {})
    key = f"{kernel}/{bits}-bit/{width}"
    if key in tuned:
        return tuned[key], True
    return table["untuned"][f"{kernel}/{bits}-bit"], False


@functools.cache
def choose_geglu_tiles(capability: int, depth: int, element_bytes: int) -> tuple[GegluTiles, bool]:
    """The stored tiles for one target, and whether they were measured there.

    Args:
        capability: compute capability, 10·major + minor.
        depth: K.
        element_bytes: 2 for fp16 and bf16, 4 for fp32.
    """
    entry, tuned = _choose(capability, "geglu", 8 * element_bytes, f"K={depth}")
    return GegluTiles(**entry), tuned


@functools.cache
def choose_layer_norm_tiles(capability: int, channels: int, element_bytes: int) -> tuple[LayerNormTiles, bool]:
    """The stored tiles for one target, and whether they were measured there.

    Args:
        capability: compute capability, 10·major + minor.
        channels: C.
        element_bytes: 2 for fp16 and bf16, 4 for fp32.
    """
    entry, tuned = _choose(capability, "add_layer_norm", 8 * element_bytes, f"C={channels}")
    return LayerNormTiles(**entry), tuned


def channel_blocks(channels: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover C with little padding."""
    whole = 1 << (channels.bit_length() - 1)
    rest = channels - whole
    return (whole, 1 << (rest - 1).bit_length()) if rest else (whole, 0)


def as_data(tiles: GegluTiles | LayerNormTiles) -> dict[str, Any]:
    """The form in which `mlp_tiles.json` keeps tiles."""
    return asdict(tiles)
