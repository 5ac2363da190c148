"""What `bench.tune` tries for each table of tiles, and the cases that it chooses by."""

import itertools
from dataclasses import dataclass
from typing import Any, Final

from storyadapter.bench.kernels.cases import (
    GEGLU_CASES,
    LAYER_NORM_CASES,
    LAYERS_1024,
    LAYERS_OTHER,
    GrcaCase,
    KernelCase,
)
from storyadapter.kernels.tiles import (
    GEGLU,
    GRCA,
    GRCA_EMBEDDED,
    LAYER_NORM,
    GegluTiles,
    GrcaTiles,
    LayerNormTiles,
    Tiles,
    TileTable,
)


@dataclass(frozen=True)
class Search:
    """One table, the candidates for its entries, and the cases that decide on them."""

    table: TileTable[Any]
    cases: tuple[KernelCase, ...]
    candidates: tuple[Tiles, ...]


def _grca_tiles(caps: tuple[int | None, ...]) -> tuple[GrcaTiles, ...]:
    """One tile per program over all shapes; several tiles, with queries read ahead and without; caps on registers."""
    shapes = itertools.product(((64, 4), (128, 4), (128, 8), (256, 16)), (32, 64), (1, 2, 3))
    several = itertools.product(((64, 4), (128, 8)), (2, 4, 8), (1, 2), (False, True), caps)
    return (
        *(GrcaTiles(m, n, 1, warps, stages, prefetch=False, heads_first=True) for (m, warps), n, stages in shapes),
        *(
            GrcaTiles(m, 32, tiles, warps, stages, prefetch, heads_first=False, max_registers=cap)
            for (m, warps), tiles, stages, prefetch, cap in several
        ),
    )


_GRCA_CASES: Final = (
    *(GrcaCase(LAYERS_1024[0], 16, frames) for frames in (1, 16, 50, 100)),
    *(GrcaCase(LAYERS_1024[1], rows, frames) for rows, frames in ((16, 16), (16, 100), (2, 16))),
    GrcaCase(LAYERS_OTHER[0], 16, 16),
)
# block_m, block_n, block_k, group_m, num_warps, num_stages, persistent, descriptors
_GEGLU_TILES: Final = tuple(
    GegluTiles(*row)
    for row in (
        (128, 256, 64, 8, 8, 4, True, True),
        (128, 256, 64, 16, 8, 4, True, True),
        (128, 256, 64, 8, 8, 3, True, True),
        (128, 256, 64, 8, 8, 4, False, True),
        (256, 128, 64, 8, 8, 4, True, True),
        (128, 128, 64, 8, 4, 3, False, True),
        (128, 256, 64, 8, 8, 4, True, False),
        (128, 256, 64, 16, 8, 4, True, False),
        (128, 256, 64, 8, 8, 3, True, False),
        (128, 256, 64, 8, 8, 4, False, False),
        (128, 256, 64, 8, 8, 3, False, False),
        (256, 128, 64, 8, 8, 4, False, False),
        (128, 128, 64, 8, 4, 3, False, False),
        (128, 128, 64, 8, 8, 3, False, False),
    )
)
# rows, num_warps
_LAYER_NORM_TILES: Final = tuple(
    LayerNormTiles(*row) for row in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4), (8, 4), (8, 8))
)
# torch.compile drops a cap on the registers, so tiles that need one are for the embedded kernel alone
SEARCHES: Final = (
    Search(GRCA, _GRCA_CASES, _grca_tiles(caps=(None,))),
    Search(GRCA_EMBEDDED, _GRCA_CASES, _grca_tiles(caps=(None, 128, 168))),
    Search(GEGLU, GEGLU_CASES, _GEGLU_TILES),
    Search(LAYER_NORM, LAYER_NORM_CASES, _LAYER_NORM_TILES),
)
