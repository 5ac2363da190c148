"""The stored tiles."""

import json
from importlib import resources

import pytest

from storyadapter.kernels.tiles import Tiles, as_data, choose_tiles

TABLE = json.loads(resources.files("storyadapter.kernels").joinpath("tiles.json").read_text(encoding="utf-8"))


def test_every_entry_is_valid() -> None:
    entries = [*TABLE["untuned"].values(), *(row for rows in TABLE["tuned"].values() for row in rows.values())]
    for entry in entries:
        tiles = Tiles(**entry)
        assert as_data(tiles) == entry
        for size in (tiles.block_m, tiles.block_n):
            assert size >= 16 and size & (size - 1) == 0


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("head_size", [32, 64])
def test_only_measured_architectures_are_marked_tuned(head_size: int, embedded: bool) -> None:
    for capability in (80, 89, 90, 100, 120):
        assert choose_tiles(capability, head_size, 2, embedded).tuned is (capability == 90 and head_size == 64)


def test_launched_tiles_leave_registers_to_the_assembler() -> None:
    # torch.compile drops the cap, so tiles that need it would be slow there without a word
    launched = [row for name, row in TABLE["untuned"].items() if name.startswith("launched/")]
    launched += [row for rows in TABLE["tuned"].values() for name, row in rows.items() if name.startswith("launched/")]
    assert launched and all(row["max_registers"] is None for row in launched)


def test_an_unknown_head_size_is_an_error() -> None:
    with pytest.raises(KeyError):
        choose_tiles(90, 48, 2)
