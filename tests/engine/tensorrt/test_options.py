"""What may be chosen about a build."""

import pytest

from storyadapter.engine.tensorrt.library import Library
from storyadapter.engine.tensorrt.options import BuildOptions, parse_resolution
from storyadapter.method.errors import InputError
from storyadapter.model.contract import Range, ShapeRanges
from tests.refusals import raises_typed

FULL, RTX = Library("tensorrt", "10.14.1"), Library("tensorrt-rtx", "1.7.1")


def test_a_resolution_is_typed_width_first() -> None:
    assert parse_resolution("832x1216") == (1216, 832)


@pytest.mark.parametrize("text", ["832", "832x", "x", "832*1216", "831x1216", "0x32", "832x1216x3", "-32x32"])
def test_other_resolutions_are_refused(text: str) -> None:
    with raises_typed(InputError, match="^--resolution is "):
        parse_resolution(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimization_level": 6}, "--optimization-level is 6; expected 0 to 5"),
        ({"optimization_level": -1}, "--optimization-level is -1; expected 0 to 5"),
        ({"workspace_mib": 0}, "--workspace is 0; expected 1 or more MiB"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, int], told: str) -> None:
    with raises_typed(InputError, match=f"^{told}$"):
        BuildOptions(**options)


def test_a_resolution_outside_of_the_ranges_is_refused() -> None:
    ranges = ShapeRanges(1, 1, Range(768, 1024), Range(1024, 1024))
    BuildOptions(resolutions=((768, 1024),)).check(ranges, FULL)
    with raises_typed(InputError, match="^--resolution 832x768 is outside of --width 1024 and --height 768..1024$"):
        BuildOptions(resolutions=((768, 832),)).check(ranges, FULL)


def test_an_optimization_level_is_only_for_the_library_that_has_use_for_it() -> None:
    """TensorRT-RTX takes one and builds the same: see `test_what_the_options_do` of the builder."""
    ranges = ShapeRanges(1, 1, Range(1024, 1024), Range(1024, 1024))
    BuildOptions(5).check(ranges, FULL)
    BuildOptions(None, 512).check(ranges, RTX)
    with raises_typed(InputError, match="^--optimization-level was given, but tensorrt-rtx 1.7.1 builds the same at "):
        BuildOptions(5).check(ranges, RTX)


def test_what_was_chosen_is_named_and_nothing_else() -> None:
    assert BuildOptions().named() == ()
    assert dict(BuildOptions(5, 512, ((1216, 832), (832, 1216))).named()) == {
        "optimization level": "5",
        "workspace MiB": "512",
        "resolutions": "1216x832,832x1216",
    }
    assert BuildOptions(0).named() == (("optimization level", "0"),)
