"""What a user may choose about a TensorRT build. Imports nothing heavy."""

import re
from dataclasses import dataclass

from storyadapter.engine.tensorrt.library import Library
from storyadapter.method.errors import Field, InputError
from storyadapter.model.contract import ShapeRanges, check_pixels


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose about the build; none of it changes what an engine computes.

    Attributes:
        optimization_level: 0 (fastest build) to 5 (fastest engine); None is TensorRT's own default, 3. Of `tensorrt`
            alone.
        workspace_mib: the most scratch memory of one layer, in MiB; None is TensorRT's own default, all there is.
        resolutions: (height, width) in pixels, each a profile of its own beside the one for the whole range.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    resolutions: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(Field("optimization_level"), f" is {self.optimization_level}", expected="0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(Field("workspace"), f" is {self.workspace_mib}", expected="1 or more MiB")

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
