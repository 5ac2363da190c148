"""The tiles that `bench.tune_mlp` tries, as data."""

from typing import Final

from storyadapter.kernels.tiles import GegluTiles, LayerNormTiles

# block_m, block_n, block_k, group_m, num_warps, num_stages, persistent, descriptors
GEGLU_TILES: Final = tuple(
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
LAYER_NORM_TILES: Final = tuple(
    LayerNormTiles(*row) for row in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4), (8, 4), (8, 8))
)


def words(tiles: GegluTiles | LayerNormTiles) -> str:
    """Tiles in a few words, for a table."""
    if isinstance(tiles, LayerNormTiles):
        return f"rows {tiles.rows}, warps {tiles.num_warps}"
    return (
        f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k}, groups of {tiles.group_m}, {tiles.num_warps} warps, "
        f"{tiles.num_stages} stages, {'persistent' if tiles.persistent else 'once'}, "
        f"{'TMA' if tiles.descriptors else 'cp.async'}"
    )
