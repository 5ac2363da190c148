"""What a user may choose about a TensorRT build. Imports nothing heavy."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from storyadapter.engine.backend import Setting
from storyadapter.engine.tensorrt.library import AUTO, Library, parse_targets
from storyadapter.method.errors import Field, InputError
from storyadapter.model.contract import ShapeRanges, check_pixels

SETTINGS: Final = (
    Setting(
        "target",
        "SM",
        "GPU architecture to build for, such as sm89; with TensorRT-RTX also several, such as sm89,sm120 "
        "(default: auto, the GPU of this machine)",
        default=AUTO,
    ),
    Setting(
        "optimization_level",
        "0-5",
        "from the fastest build to the fastest engine (default: TensorRT's own, 3; not with TensorRT-RTX, which "
        "builds the same at every level)",
        int,
    ),
    Setting("workspace", "MIB", "the most scratch memory of one layer (default: all there is)", int),
    Setting(
        "resolution",
        "WxH",
        (
            ("a size within ", Field("width"), " and ", Field("height")),
            " to tune for besides the whole range; may be given several times",
        ),
        default=[],
        several=True,
    ),
)


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose about the build; none of it changes what an engine computes."""

    # 0 (fastest build) to 5 (fastest engine); None is TensorRT's own default, 3. Of `tensorrt` alone
    optimization_level: int | None = None
    # the most scratch memory of one layer, in MiB; None is TensorRT's own default, all there is
    workspace_mib: int | None = None
    # (height, width) in pixels, each a profile of its own beside the one for the whole range
    resolutions: tuple[tuple[int, int], ...] = ()
    targets: tuple[str, ...] = ()  # architectures to build for, such as "sm89"; by default that of the GPU here

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(Field("optimization_level"), f" is {self.optimization_level}", expected="0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(Field("workspace"), f" is {self.workspace_mib}", expected="1 or more MiB")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """From the values of `SETTINGS` by name. Raises InputError: a value that can't be served."""
        resolutions = tuple(dict.fromkeys(parse_resolution(text) for text in given["resolution"]))
        targets = parse_targets(given["target"])
        return cls(given["optimization_level"], given["workspace"], resolutions, targets)

    def check(self, ranges: ShapeRanges, library: Library) -> None:
        """Raises InputError if a resolution lies outside of the ranges, or the library has no use for an option."""
        if self.optimization_level is not None and not library.has_levels:
            raise InputError(
                Field("optimization_level"),
                f" was given, but {library} builds the same at every level: it chooses its kernels when an engine is "
                "first run",
                advice="leave it out",
            )
        for height, width in self.resolutions:
            if height not in ranges.height or width not in ranges.width:
                raise InputError(
                    Field("resolution"),
                    f" {width}x{height} is outside of ",
                    (Field("width"), f" {ranges.width} and ", Field("height"), f" {ranges.height}"),
                )

    def named(self) -> tuple[tuple[str, str], ...]:
        """Those that were chosen, in words, for an engine's key."""
        chosen = {
            "optimization level": self.optimization_level,
            "workspace MiB": self.workspace_mib,
            "resolutions": ",".join(f"{width}x{height}" for height, width in sorted(self.resolutions)) or None,
        }
        return tuple((name, str(value)) for name, value in chosen.items() if value is not None)


def parse_resolution(text: str) -> tuple[int, int]:
    """ "832x1216", width first as the program's messages have it, → (height, width) = (1216, 832).

    Raises:
        InputError: it is no size in multiples of 32.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        expected = "width x height in pixels, such as 832x1216"
        raise InputError(Field("resolution"), f" is {text!r}", expected=expected)
    width, height = int(match[1]), int(match[2])
    for pixels in (width, height):
        check_pixels("resolution", pixels)
    return height, width
