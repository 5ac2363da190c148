"""What may be chosen about a build."""

import pytest

from storyadapter.contract import Range, ShapeRanges
from storyadapter.engine.tensorrt.options import BuildOptions, parse_resolution
from storyadapter.errors import InputError


def test_a_resolution_is_typed_width_first() -> None:
    assert parse_resolution("832x1216") == (1216, 832)


@pytest.mark.parametrize("text", ["832", "832x", "x", "832*1216", "831x1216", "0x32", "832x1216x3", "-32x32"])
def test_other_resolutions_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="^--resolution is "):
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
    with pytest.raises(InputError, match=f"^{told}$"):
        BuildOptions(**options)


def test_a_resolution_outside_of_the_ranges_is_refused() -> None:
    ranges = ShapeRanges(1, 1, Range(768, 1024), Range(1024, 1024))
    BuildOptions(resolutions=((768, 1024),)).check(ranges)
    with pytest.raises(InputError, match="^--resolution 832x768 is outside of --width 1024 and --height 768..1024$"):
        BuildOptions(resolutions=((768, 832),)).check(ranges)


def test_what_was_chosen_is_named_and_nothing_else() -> None:
    assert BuildOptions().named() == ()
    assert dict(BuildOptions(5, 512, ((1216, 832), (832, 1216))).named()) == {
        "optimization level": "5",
        "workspace MiB": "512",
        "resolutions": "1216x832,832x1216",
    }
    assert BuildOptions(0).named() == (("optimization level", "0"),)
