"""The cases of the ladder and the whole stories, as data."""

from dataclasses import dataclass
from typing import Any, Final

from storyadapter.method import constants
from storyadapter.method.errors import InputError
from storyadapter.model.contract import Range, ShapeRanges


@dataclass(frozen=True)
class Case:
    """One micro-batch that rungs of the ladder denoise; UNet calls have B = 2·F rows."""

    name: str  # as typed after `--cases`
    references: int  # N, all of which every frame attends to
    frames: int  # F
    height: int  # in pixels
    width: int
    check_steps: int = 3  # of the drawings by which a rung is compared with the one below
    rungs: tuple[str, ...] | None = None  # names of those that run it; None for all of them and the baselines
    controlled: bool = False  # whether every frame has a picture for each ControlNet of the model

    @property
    def rows(self) -> int:
        """B, with the unconditional rows."""
        return 2 * self.frames


@dataclass(frozen=True)
class StoryCase:
    """One whole story: `iterations` after the text-only one, in micro-batches of `max_frames`; None: as many as fit."""

    name: str
    frames: int
    iterations: int
    steps: int
    max_frames: int | None
    height: int
    width: int

    @property
    def drawn(self) -> int:
        """Frames drawn in all iterations."""
        return self.frames * (1 + self.iterations)

    @property
    def unet_rows(self) -> int:
        return 2 * self.steps * self.drawn


# Of the case "pair" one way is to draw it as two stories of half the length at once.
PAIR: Final = "pair"

# What the published command draws in the longest story of its paper.
PUBLISHED: Final = StoryCase("published", 100, constants.ITERATIONS, constants.STEPS, 8, 1024, 1024)

_FRAME_BY_FRAME: Final = ("published", "batched", "sdpa")
_LAST: Final = ("compiled", "graphs", "fp8")  # the fastest of one call; without a GPU there are no graphs

CASES: Final = (
    Case("n16", 16, 8, 1024, 1024),
    Case("n8", 8, 8, 1024, 1024, rungs=_LAST),
    Case("n100", 100, 8, 1024, 1024, check_steps=2, rungs=(*_FRAME_BY_FRAME, *_LAST)),
)
# of a model with ControlNets, beside the others
CONTROL: Final = Case("control", 16, 8, 1024, 1024, rungs=("cached", "fused", *_LAST), controlled=True)
STORIES: Final = (StoryCase("story", 16, 2, 20, 8, 1024, 1024), StoryCase(PAIR, 8, 2, 20, 8, 1024, 1024))

SMOKE_CASES: Final = (Case("n3", 3, 2, 64, 64), Case("n5", 5, 2, 64, 64, rungs=(*_FRAME_BY_FRAME, *_LAST)))
SMOKE_CONTROL: Final = Case("control", 3, 2, 64, 64, rungs=CONTROL.rungs, controlled=True)
SMOKE_STORIES: Final = (StoryCase("story", 3, 2, 3, 2, 64, 64), StoryCase(PAIR, 2, 1, 2, 2, 64, 64))


def chosen(names: list[str] | None, known: tuple[Any, ...], option: str) -> tuple[Any, ...]:
    """Those of `known` (anything with a name) whose names were typed, in the order of `known`; all without names.

    Raises:
        InputError: an unknown name.
    """
    if names is None:
        return known
    by_name = {item.name: item for item in known}
    if unknown := [name for name in names if name not in by_name]:
        raise InputError(f"{option} {unknown[0]}: expected some of {','.join(by_name)}")
    return tuple(item for item in known if item.name in names)


def ranges(cases: tuple[Case, ...], stories: tuple[StoryCase, ...]) -> ShapeRanges:
    """What an engine must be built for to serve all of them."""
    sized: tuple[Case | StoryCase, ...] = (*cases, *stories)
    at_once = [case.frames for case in cases] + [story.max_frames or 1 for story in stories]
    references = [case.references for case in cases] + [story.frames for story in stories]
    height, width = (Range(min(sides), max(sides)) for sides in zip(*((c.height, c.width) for c in sized), strict=True))
    return ShapeRanges(max(at_once), max(references), height, width)
