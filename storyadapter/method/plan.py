"""What a run is asked for, and how its frames are split into micro-batches. Imports nothing heavy."""

import os
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Final

from storyadapter.method import constants
from storyadapter.method.errors import Field, InputError
from storyadapter.method.text import unprintable

SEED_LIMIT: Final = 2**63
FRAMES_UNMEASURED: Final = 8  # of a micro-batch, where the memory isn't measured
FRAMES_AT_MOST: Final = 16  # of a micro-batch that is chosen by memory: more make no row faster, and overlap less


def setting(help: str, default: Any = MISSING, **option: Any) -> Any:
    """A field of a plan: its help text, its default and what else its option needs: choices, metavar."""
    return field(default=default, metadata={"help": help, **option})


@dataclass(frozen=True)
class SamplerSettings:
    """What decides a sampler's table; each as in `RunPlan`."""

    scheduler: str
    steps: int
    karras: bool
    prediction_type: str
    zero_terminal_snr: bool


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Every setting that decides the pictures of a story, besides the story and the model; options are made from it.

    Needs nothing: by default it is the published method, at the model's own size (`height` and `width` None), with a
    seed that is drawn once. The seed is that of every frame of every iteration. `max_frames` is None for as many as fit
    on a GPU, elsewhere 8.

    >>> RunPlan(seed=7, steps=20, scales=(0.3, 0.5)).iterations
    3

    Raises:
        InputError: a value that can't be served.
    """

    height: int | None = setting("height of the frames in pixels, a multiple of 32", None)
    width: int | None = setting("width of the frames in pixels, a multiple of 32", None)
    scales: tuple[float, ...] = field(
        default_factory=constants.reference_scales, metadata={"help": "λ of each iteration after the text-only one"}
    )
    steps: int = setting("denoising steps", constants.STEPS)
    scheduler: str = setting("sampler", constants.SCHEDULER, choices=tuple(constants.SAMPLERS))
    karras: bool = setting("Karras noise levels, for euler and dpmpp_2m", False)
    prediction_type: str = setting(
        "what the UNet was trained to predict", "epsilon", choices=constants.PREDICTION_TYPES
    )
    # arXiv 2305.08891
    zero_terminal_snr: bool = setting(
        "start from pure noise, with trailing time steps, as many v_prediction models were trained", False
    )
    guidance: float = setting("classifier-free guidance; 1 or less computes no unconditional rows", constants.GUIDANCE)
    seed: int = field(
        default_factory=lambda: int.from_bytes(os.urandom(4)),
        metadata={"help": "of the whole story; a frame of a story file may have its own"},
    )
    negative_prompt: str = setting(
        "what no frame shall show; a frame of a story file may have its own", constants.NEGATIVE_PROMPT, metavar="T"
    )
    max_frames: int | None = setting("frames drawn together in one micro-batch, at most", None)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if (pixels := getattr(self, name)) is not None:
                check_pixels(name, pixels)
        if not 0 <= self.seed < SEED_LIMIT:
            raise InputError(Field("seed"), f" is {self.seed}", expected="0 to 2^63 - 1")
        if char := unprintable(self.negative_prompt):
            found = f" holds {char}, which is no printable character"
            raise InputError(Field("negative_prompt"), found, advice="take it out")
        for scale in self.scales:
            if not 0 <= scale <= constants.MAX_SCALE:
                expected = f"each λ from 0 to {constants.MAX_SCALE:g}"
                raise InputError(Field("scales"), f" has {scale:g}", expected=expected)
        for name, choices in ((item.name, item.metadata.get("choices")) for item in fields(self)):
            if choices and getattr(self, name) not in choices:
                raise InputError(Field(name), f" is {getattr(self, name)}", expected=f"one of {', '.join(choices)}")
        most = constants.MAX_STEPS[self.scheduler]
        if not 1 <= self.steps <= most:
            limits = (f"1 to {most} with ", Field("scheduler"), f" {self.scheduler}")
            raise InputError(Field("steps"), f" is {self.steps}", expected=limits)
        if not 0 <= self.guidance <= 100:
            raise InputError(Field("guidance"), f" is {self.guidance:g}", expected="0 to 100")
        if self.max_frames is not None and self.max_frames < 1:
            raise InputError(Field("max_frames"), f" is {self.max_frames}", expected="1 or more")

    def sized(self, pixels: int) -> "RunPlan":
        """The same with a size: where it has none, that of a model of so many pixels."""
        return replace(self, height=self.height or pixels, width=self.width or pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width. Raises InputError: they are the model's own, which isn't known here; see `sized`."""
        if self.height is None or self.width is None:
            raise InputError(Field("height"), " and ", Field("width"), " are not set", expected="a number of pixels")
        return self.height, self.width

    @property
    def iterations(self) -> int:
        """All iterations, the text-only one included."""
        return 1 + len(self.scales)

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are computed (as in diffusers: guidance above 1)."""
        return self.guidance > 1

    @property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(self.scheduler, self.steps, self.karras, self.prediction_type, self.zero_terminal_snr)

    def scale_of(self, iteration: int) -> float | None:
        """λ of an iteration; None for iteration 0, which has no references."""
        return None if iteration == 0 else self.scales[iteration - 1]

    def references(self, frames: int) -> int:
        """N, the references that a story of so many frames needs room for; 1 if no frame ever attends to any."""
        return frames if self.scales else 1

    def unet_rows(self, frames: int) -> int:
        """Rows of all UNet calls of a story of so many frames."""
        return frames * self.iterations * self.steps * (2 if self.guided else 1)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scales": list(self.scales)}


def split_evenly(frames: int, max_frames: int) -> tuple[range, ...]:
    """Micro-batches of at most `max_frames` whose sizes differ by one at most: 7 by 4 → 4 + 3, 10 by 8 → 5 + 5."""
    batches = -(-frames // max_frames)
    size, larger = divmod(frames, batches)
    starts = [batch * size + min(batch, larger) for batch in range(batches + 1)]
    return tuple(range(start, stop) for start, stop in zip(starts, starts[1:], strict=False))


def check_pixels(name: str, pixels: int) -> None:
    """Raises InputError unless `pixels` is a positive multiple of 32."""
    if pixels < constants.PIXEL_MULTIPLE or pixels % constants.PIXEL_MULTIPLE:
        lower = max(constants.PIXEL_MULTIPLE, pixels // constants.PIXEL_MULTIPLE * constants.PIXEL_MULTIPLE)
        raise InputError(
            Field(name),
            f" is {pixels}",
            expected=f"a multiple of {constants.PIXEL_MULTIPLE}, such as {lower} or {lower + constants.PIXEL_MULTIPLE}",
        )
