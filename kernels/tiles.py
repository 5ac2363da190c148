"""Which tiles the kernel runs with: data chosen once by measurement and stored beside this file.

Tiles depend on the architecture, the head size and the dtype; never on B, P, G, R or S, so that no shape of a run and
no symbolic shape of a compiler leads to another compilation. Nothing is tuned in a user's run. This module imports
neither Triton nor PyTorch.
"""

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Tiles:
    """Compile-time choices of one build of the kernel.

    Attributes:
        block_m: queries of a tile; a power of two, at least 16.
        block_n: reference tokens of a block; a power of two, at least 16.
        tiles: tiles that one program takes one after the other, keeping what they share in shared memory.
        num_warps: warps of a program.
        num_stages: blocks of reference tokens in flight (1: no pipelining).
        prefetch: reads the next tile's queries while this one is computed.
        heads_first: neighbouring programs take neighbouring heads (else neighbouring queries of one head).
        max_registers: cap on the registers of a thread; None leaves it to the assembler. torch.compile ignores it.
    """

    block_m: int
    block_n: int
    tiles: int
    num_warps: int
    num_stages: int
    prefetch: bool
    heads_first: bool
    max_registers: int | None = None

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments that are tiles."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "TILES": self.tiles,
            "PREFETCH": self.prefetch,
            "HEADS_FIRST": self.heads_first,
        }

    def options(self) -> dict[str, int]:
        """The compiler's options."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return found if self.max_registers is None else {**found, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class TileChoice:
    """Tiles, and whether they were chosen by measuring on that architecture (`tuned`) or are a safe default."""

    tiles: Tiles
    tuned: bool


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("storyadapter.kernels").joinpath("tiles.json").read_text(encoding="utf-8"))


@functools.cache
def choose_tiles(capability: int, head_size: int, element_bytes: int, embedded: bool = False) -> TileChoice:
    """The stored tiles for one target.

    Args:
        capability: compute capability, 10·major + minor: 80, 89, 90, 100, 120.
        head_size: D, 32 or 64.
        element_bytes: 2 for fp16 and bf16, 4 for fp32.
        embedded: tiles whose shared memory is at most 48 KB, the most that a launch gets without asking for more.

    Raises:
        KeyError: the table holds no tiles for the head size or element size.
    """
    table = _table()
    purpose = "embedded" if embedded else "launched"
    key = f"{purpose}/{element_bytes * 8}-bit/D={head_size}"
    tuned = table["tuned"].get(f"sm_{capability}", {})
    if key in tuned:
        return TileChoice(Tiles(**tuned[key]), tuned=True)
    return TileChoice(Tiles(**table["untuned"][key]), tuned=False)


def as_data(tiles: Tiles) -> dict[str, Any]:
    """The form in which `tiles.json` keeps tiles."""
    return asdict(tiles)
