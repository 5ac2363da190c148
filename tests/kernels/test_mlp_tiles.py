"""The stored tiles of the GEGLU and the layer norm."""

import json
from importlib import resources

from storyadapter.kernels.mlp_tiles import (
    GegluTiles,
    LayerNormTiles,
    as_data,
    choose_geglu_tiles,
    choose_layer_norm_tiles,
)

TABLE = json.loads(resources.files("storyadapter.kernels").joinpath("mlp_tiles.json").read_text(encoding="utf-8"))


def test_every_entry_is_valid() -> None:
    rows = [*TABLE["untuned"].items(), *(row for rows in TABLE["tuned"].values() for row in rows.items())]
    for name, entry in rows:
        tiles = (GegluTiles if name.startswith("geglu/") else LayerNormTiles)(**entry)
        assert as_data(tiles) == entry
        sizes = [value for key, value in entry.items() if key.startswith("block_") or key == "rows"]
        assert all(size & (size - 1) == 0 for size in sizes)


def test_untuned_tiles_need_no_tensor_memory_accelerator() -> None:
    assert not any(row.get("descriptors") for row in TABLE["untuned"].values())


def test_unknown_targets_and_widths_get_untuned_tiles() -> None:
    for capability, width in ((75, 640), (90, 656)):
        assert choose_geglu_tiles(capability, width, 2) == (GegluTiles(**TABLE["untuned"]["geglu/16-bit"]), False)
        untuned = LayerNormTiles(**TABLE["untuned"]["add_layer_norm/16-bit"])
        assert choose_layer_norm_tiles(capability, width, 2) == (untuned, False)


def test_measured_tiles_are_marked() -> None:
    for architecture, rows in TABLE["tuned"].items():
        for name, entry in rows.items():
            capability, width = int(architecture.removeprefix("sm_")), int(name.rpartition("=")[2])
            choose = choose_geglu_tiles if name.startswith("geglu/") else choose_layer_norm_tiles
            tiles, tuned = choose(capability, width, int(name.split("/")[1].removesuffix("-bit")) // 8)
            assert tuned and as_data(tiles) == entry
