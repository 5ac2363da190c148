"""How a ControlNet is used: its strength, the steps that it takes part in, and what is done to pictures before it."""

from dataclasses import dataclass
from typing import Final

from storyadapter.method.errors import Field, InputError

PREPROCESSINGS: Final = ("none", "canny")
_MAX_SCALE: Final = 10.0


@dataclass(frozen=True)
class ControlSettings:
    """Of one ControlNet, for all frames that have a picture for it; the defaults are the published ones.

    Attributes:
        scale: what it adds is multiplied by it.
        start, end: share of the steps between which it takes part.
        preprocess: "canny" for pictures that become maps of edges, "none" for those that are maps already.

    Raises:
        InputError: a value that can't be served.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= _MAX_SCALE:
            raise InputError(Field("controlnet"), f": its scale is {self.scale:g}", expected=f"0 to {_MAX_SCALE:g}")
        if not 0 <= self.start < self.end <= 1:
            expected = "two shares of the steps from 0 to 1, the lower one first"
            raise InputError(Field("controlnet"), f": its steps are {self.start:g}-{self.end:g}", expected=expected)
        if self.preprocess not in PREPROCESSINGS:
            expected = f"one of {', '.join(PREPROCESSINGS)}"
            raise InputError(Field("preprocess"), f" is {self.preprocess}", expected=expected)


def controlled_calls(share: tuple[float, float], steps: int, skipped: int = 0) -> range:
    """Which UNet calls a ControlNet takes part in, of so many steps of which the first are skipped.

    Those that begin and end within its share of the steps, as in diffusers' pipelines.
    """
    start, end = share
    within = [step for step in range(steps) if step / steps >= start and (step + 1) / steps <= end]
    if not within:
        return range(0)
    return range(max(0, within[0] - skipped), max(0, within[-1] + 1 - skipped))
