"""The stored tiles: their form, and which are chosen."""

from dataclasses import asdict

import pytest

from storyadapter.kernels.tiles import (
    CONVOLUTION_FP8,
    GEGLU,
    GEGLU_FP8,
    GRCA,
    GRCA_EMBEDDED,
    GROUP_NORM,
    LAYER_NORM,
    LINEAR_FP8,
    TABLES,
    GegluTiles,
    GrcaTiles,
    GroupNormTiles,
    ProductTiles,
    stored,
)
from storyadapter.kernels.tiles import LayerNormTiles as NormTiles

CAPABILITIES = (0, 75, 80, 86, 89, 90, 100, 120)
HEADS = (64, 32)
WIDTHS = tuple(range(16, 4097, 16))
# Every choice there is, by table, element size, and width where it matters: measured on sm_90, and for all others.
MEASURED = {
    (GRCA, 2, 64): GrcaTiles(64, 32, 1, 4, 1, False, True, None),
    (GRCA_EMBEDDED, 2, 64): GrcaTiles(64, 32, 4, 4, 1, True, False, 128),
    (GEGLU, 2, 640): GegluTiles(128, 256, 64, 8, 8, 3, True, True),
    (GEGLU, 2, 1280): GegluTiles(128, 256, 64, 16, 8, 4, True, True),
    (LAYER_NORM, 2, 640): NormTiles(1, 1),
    (LAYER_NORM, 2, 1280): NormTiles(1, 1),
    (CONVOLUTION_FP8, 1, 320): ProductTiles(8, 32, 128, 64, 8, 8, 4, True, True),
    **{(CONVOLUTION_FP8, 1, n): ProductTiles(8, 16, 256, 128, 8, 8, 3, True, True) for n in (640, 1280)},
    (CONVOLUTION_FP8, 1, 128): ProductTiles(8, 32, 128, 128, 8, 8, 3, True, True),
    **{(CONVOLUTION_FP8, 1, n): ProductTiles(8, 16, 256, 128, 8, 8, 3, True, True) for n in (256, 512)},
    **{(LINEAR_FP8, 1, k): ProductTiles(1, 128, 256, 128, 8, 8, 3, True, True) for k in (640, 1280, 2560, 5120)},
    **{(GEGLU_FP8, 1, k): ProductTiles(1, 128, 256, 128, 8, 8, 3, True, True) for k in (640, 1280)},
}
UNTUNED = {
    (GRCA, 2, HEADS): GrcaTiles(64, 32, 1, 4, 2, False, True, None),
    (GRCA, 4, HEADS): GrcaTiles(32, 16, 1, 4, 1, False, False, None),
    (GRCA_EMBEDDED, 2, HEADS): GrcaTiles(64, 32, 1, 4, 1, False, True, None),
    (GEGLU, 2, WIDTHS): GegluTiles(128, 128, 32, 8, 8, 3, False, False),
    (GEGLU, 4, WIDTHS): GegluTiles(32, 32, 16, 8, 4, 2, False, False),
    (LAYER_NORM, 2, WIDTHS): NormTiles(4, 4),
    (LAYER_NORM, 4, WIDTHS): NormTiles(2, 4),
    (CONVOLUTION_FP8, 1, WIDTHS): ProductTiles(4, 16, 128, 64, 8, 8, 3, False, False),
    (LINEAR_FP8, 1, (*WIDTHS, 5120)): ProductTiles(1, 128, 128, 64, 8, 8, 3, False, False),
    (GEGLU_FP8, 1, WIDTHS): ProductTiles(1, 128, 128, 64, 8, 8, 3, False, False),
    (GROUP_NORM, 2, WIDTHS): GroupNormTiles(16, 16, 128, 4),
    (GROUP_NORM, 4, WIDTHS): GroupNormTiles(16, 16, 64, 4),
}


def test_every_choice() -> None:
    for (table, element_bytes, widths), untuned in UNTUNED.items():
        for width in widths:
            for capability in CAPABILITIES:
                measured = MEASURED.get((table, element_bytes, width)) if capability == 90 else None
                expected = (untuned, False) if measured is None else (measured, True)
                assert table.choose(capability, element_bytes, width) == expected


def test_stored_tiles_have_the_fields_of_their_class() -> None:
    assert stored().keys() == {table.kernel for table in TABLES}
    for table in TABLES:
        for entries in stored()[table.kernel].values():
            for entry in entries.values():
                tiles = table.kind(**entry)
                assert asdict(tiles) == entry
                for name, size in entry.items():
                    if name.startswith("block_") or name == "rows":
                        assert size >= (1 if name in ("rows", "block_h") else 16) and size.bit_count() == 1


def test_fields_are_arguments_of_the_kernel_or_options_of_the_compiler() -> None:
    tiles, _ = GRCA_EMBEDDED.choose(90, 2, 64)
    constants = {"BLOCK_M": 64, "BLOCK_N": 32, "TILES": 4, "PREFETCH": True, "HEADS_FIRST": False}
    assert tiles.constants() == constants
    assert tiles.options() == {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
    assert GRCA.choose(90, 2, 64)[0].options() == {"num_warps": 4, "num_stages": 1}
    assert NormTiles(2, 4).constants() == {"ROWS": 2} and NormTiles(2, 4).options() == {"num_warps": 4}


def test_launched_tiles_leave_registers_to_the_assembler() -> None:
    # torch.compile drops the cap, so tiles that need it would be slow there without a word
    entries = [entry for entries in stored()["grca"].values() for entry in entries.values()]
    assert all(entry["max_registers"] is None for entry in entries)


def test_untuned_tiles_need_no_tensor_memory_accelerator() -> None:
    for table in (GEGLU, CONVOLUTION_FP8, LINEAR_FP8, GEGLU_FP8):
        assert not any(entry["descriptors"] for entry in stored()[table.kernel]["untuned"].values())


@pytest.mark.parametrize(("table", "element_bytes", "width"), [(GRCA, 2, 48), (GRCA_EMBEDDED, 4, 64), (GEGLU, 8, 640)])
def test_a_kernel_that_does_not_exist_has_no_tiles(table: object, element_bytes: int, width: int) -> None:
    with pytest.raises(KeyError):
        table.choose(90, element_bytes, width)
