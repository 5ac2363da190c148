"""What a run is asked for, and how its frames are split into micro-batches. Imports nothing heavy."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from operator import ge
from typing import Any, Final, Self

from storyadapter.method import constants
from storyadapter.method.control import ControlSettings
from storyadapter.method.errors import Field, InputError
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.text import unprintable

SEED_LIMIT: Final = 2**63
FRAMES_UNMEASURED: Final = 8  # of a micro-batch, where the memory isn't measured
FRAMES_AT_MOST: Final = 16  # of a micro-batch that is chosen by memory: more make no row faster, and overlap less


def setting(help: str, default: Any = MISSING, **option: Any) -> Any:
    """A field of a plan: its help text, its default and what else its option needs.

    `option`: choices; metavar; `shown`, how the default is told where it isn't a value; `typed` False for what has no
    option.
    """
    return field(default=default, metadata={"help": help, **option})


@dataclass(frozen=True)
class SamplerSettings:
    """What decides a sampler's table; each as in `RunPlan`, with what it leaves open decided."""

    scheduler: str
    steps: int
    karras: bool = False
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    timestep_spacing: str | None = None
    timesteps: tuple[int, ...] = ()
    eta: float | None = None
    scheduler_config: str = ""
    strength: float = 1.0

    def rows(self, guided: tuple[float, float] | None) -> int:
        """Rows of the UNet calls of a frame with guidance in this interval, or without any."""
        calls = last_calls(self.steps, self.strength)
        skipped = self.steps - calls
        return calls + (0 if guided is None else len(guided_calls(guided, self.steps, skipped)))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Every setting that decides the pictures of a story, besides the story and the model; options are made from it.

    Needs nothing: by default it is the published method, but for prompts that are longer than it reads, at the model's
    own size (`height` and `width` None), with a seed that is drawn once. The seed is that of every frame of every
    iteration. `max_frames` is None for as many as fit on a GPU, elsewhere 8. What else is None is what the model says
    of itself: `for_model` fills it in. Where `timesteps` are given, `steps` is their number.

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
    steps: int | tuple[int, ...] = setting("denoising steps; one number, or one per iteration", constants.STEPS)
    scheduler: str = setting(
        "sampler; checkpoint is the one that the model comes with, with its time steps",
        constants.SCHEDULER,
        choices=(*constants.SAMPLERS, constants.CHECKPOINT_SCHEDULER),
    )
    karras: bool = setting("Karras noise levels, for euler and dpmpp_2m", False)
    timestep_spacing: str | None = setting(
        "where the time steps lie: few-step models other than LCM's and TCD's need trailing",
        None,
        shown="leading; trailing with zero terminal SNR; those of the checkpoint with its own scheduler",
        choices=constants.TIMESTEP_SPACINGS,
    )
    timesteps: tuple[int, ...] = setting(
        "the time steps themselves, descending, such as 999,749,499,249; their number is that of the steps",
        (),
        shown="from steps and spacing",
        metavar="t,t,…",
    )
    eta: float | None = setting(
        "share of fresh noise in the steps of tcd, 0 to 1", None, shown=f"{constants.ETA:g}", metavar="η"
    )
    prediction_type: str | None = setting(
        "what the UNet was trained to predict",
        None,
        shown="what the checkpoint says, else epsilon",
        choices=constants.PREDICTION_TYPES,
    )
    # arXiv 2305.08891
    zero_terminal_snr: bool | None = setting(
        "start from pure noise, as many v_prediction models were trained",
        None,
        shown="what the checkpoint says, else not",
    )
    guidance: float | tuple[float, ...] = setting(
        "classifier-free guidance; 1 or less computes no unconditional rows; one number, or one per "
        "iteration, each with its point (7.0,5.0)",
        constants.GUIDANCE,
    )
    # arXiv 2404.07724
    guidance_interval: tuple[float, float] = setting(
        "share of the steps between which guidance is used, such as 0.1:0.6; steps outside it compute no unconditional "
        "rows and cost half",
        (0.0, 1.0),
        shown="0:1",
        metavar="LOW:HIGH",
    )
    reference_scale: float = setting(
        "λ of a user's reference pictures in the iteration from text alone", constants.FIRST_SCALE, metavar="λ"
    )
    keep_references: bool = setting(
        "keep reference pictures in every later iteration, beside the frames of the one before", False
    )
    # arXiv 2108.01073
    strength: float = setting(
        "share of the steps that iterations after the first run: each frame starts from itself in the iteration "
        "before, noised as far; 1 starts from noise alone",
        1.0,
        metavar="S",
    )
    seed: int = field(
        default_factory=lambda: int.from_bytes(os.urandom(4)),
        metadata={"help": "of the whole story; a frame of a story file may have its own"},
    )
    negative_prompt: str = setting(
        "what no frame shall show; a frame of a story file may have its own", constants.NEGATIVE_PROMPT, metavar="T"
    )
    prompt_chunks: str = setting(
        f"how a prompt beyond {constants.CHUNK_TOKENS} tokens is read: auto reads all of it, in chunks of as many; 1 "
        "cuts it there, as published",
        "auto",
        choices=("auto", "1"),
    )
    max_frames: int | None = setting("frames drawn together in one micro-batch, at most", None)
    scheduler_config: str = setting("of the model's own scheduler, where that is taken", "", typed=False)
    embeds_guidance: bool = setting("whether the UNet takes the guidance as an embedding", False, typed=False)
    reference_vae: bool = setting("whether all iterations but the last are decoded by a tiny VAE", False, typed=False)
    controls: tuple[ControlSettings, ...] = setting("how each ControlNet of the model is used", (), typed=False)

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
        if not 0 <= self.reference_scale <= constants.MAX_SCALE:
            found, expected = f" is {self.reference_scale:g}", f"0 to {constants.MAX_SCALE:g}"
            raise InputError(Field("reference_scale"), found, expected=expected)
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value not in (*choices, item.default):
                raise InputError(Field(item.name), f" is {value}", expected=f"one of {', '.join(choices)}")
        if self.timesteps:
            self._check_timesteps()
        self._spread("steps", "guidance")
        most = constants.MAX_STEPS[self.scheduler]
        for steps in _values(self.steps):
            if not 1 <= steps <= most:
                limits = (f"1 to {most} with ", Field("scheduler"), f" {self.scheduler}")
                raise InputError(Field("steps"), f" is {steps}", expected=limits)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(Field("eta"), f" is {self.eta:g}", expected="0 to 1")
        for steps in _values(self.steps)[isinstance(self.steps, tuple) :] if self.scales else ():
            if not 0 < self.strength <= 1 or not last_calls(steps, self.strength):
                expected = f"more than 0 and at most 1, and a share of {steps} steps that is at least one"
                raise InputError(Field("strength"), f" is {self.strength:g}", expected=expected)
        for guidance in _values(self.guidance):
            if not 0 <= guidance <= 100:
                raise InputError(Field("guidance"), f" is {guidance:g}", expected="0 to 100")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        controls = (ControlSettings(**item) if isinstance(item, dict) else item for item in self.controls)
        object.__setattr__(self, "controls", tuple(controls))
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            expected = "two shares of the steps from 0 to 1, the lower one first"
            raise InputError(Field("guidance_interval"), f" is {low:g}:{high:g}", expected=expected)
        if self.guidance_interval != (0, 1) and not self.guided:
            reason = " with a UNet that embeds the guidance" if self.embeds_guidance else " without guidance above 1"
            raise InputError(Field("guidance_interval"), reason, advice="there are no unconditional rows: leave it out")
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
        """Whether any iteration computes unconditional rows."""
        return any(map(self.is_guided_in, range(self.iterations)))

    def steps_in(self, iteration: int) -> int:
        return self.steps[iteration] if isinstance(self.steps, tuple) else self.steps

    def guidance_in(self, iteration: int) -> float:
        return self.guidance[iteration] if isinstance(self.guidance, tuple) else self.guidance

    def is_guided_in(self, iteration: int) -> bool:
        """Whether unconditional rows are computed (as in diffusers: guidance above 1, and no embedding of it)."""
        return self.guidance_in(iteration) > 1 and not self.embeds_guidance

    def sampler_in(self, iteration: int) -> SamplerSettings:
        return SamplerSettings(
            self.scheduler,
            self.steps_in(iteration),
            self.karras,
            self.prediction_type or "epsilon",
            bool(self.zero_terminal_snr),
            self.timestep_spacing,
            self.timesteps,
            self.eta,
            self.scheduler_config,
            self.strength if iteration else 1.0,
        )

    def for_model(self, model: ModelSampling) -> Self:
        """The same plan with everything decided that it leaves to the model. Nothing is left to decide twice.

        Raises:
            InputError: the UNet predicts something that no sampler here knows.
        """
        prediction = self.prediction_type or model.prediction_type or "epsilon"
        if prediction not in constants.PREDICTION_TYPES:
            expected = f"one of {', '.join(constants.PREDICTION_TYPES)}"
            raise InputError(f"{model.source} says that the model predicts {prediction!r}", expected=expected)
        starts_from_noise = model.zero_terminal_snr if self.zero_terminal_snr is None else self.zero_terminal_snr
        own = self.scheduler == constants.CHECKPOINT_SCHEDULER
        return replace(
            self,
            prediction_type=prediction,
            zero_terminal_snr=bool(starts_from_noise),
            scheduler_config=self.scheduler_config or (model.scheduler if own else ""),
            embeds_guidance=self.embeds_guidance or model.embeds_guidance,
        )

    def scale_of(self, iteration: int) -> float | None:
        """λ of an iteration; None for iteration 0, which has no references."""
        return None if iteration == 0 else self.scales[iteration - 1]

    def references(self, frames: int, pictures: int = 0) -> int:
        """N, the references that a story of so many frames needs room for; 1 if no frame ever attends to any.

        Args:
            pictures: of a user's, that one frame attends to at the most.
        """
        later = frames + pictures * self.keep_references if self.scales else 1
        return max(later, pictures)

    def rows_in(self, iteration: int) -> int:
        """Rows of all UNet calls of one frame of an iteration."""
        sampler = self.sampler_in(iteration)
        interval = self.guidance_interval if self.is_guided_in(iteration) else None
        return sampler.rows(interval)

    def unet_rows(self, frames: int) -> int:
        """Rows of all UNet calls of a story of so many frames."""
        return frames * sum(map(self.rows_in, range(self.iterations)))

    def rows_at(self, iteration: int, step: int) -> int:
        """Rows of one frame in one of its UNet calls, which are counted from 1."""
        steps = self.steps_in(iteration)
        skipped = steps - last_calls(steps, self.strength if iteration else 1.0)
        guided = self.is_guided_in(iteration) and step - 1 in guided_calls(self.guidance_interval, steps, skipped)
        return 2 if guided else 1

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; of what few runs have, only what is there."""
        values = {**asdict(self), "scales": list(self.scales)}
        return {name: value for name, value in values.items() if value or name not in ("controls", "reference_vae")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The plan that `as_dict` gave, also by way of JSON. Raises TypeError: other names than a plan's."""
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)

    def _spread(self, *names: str) -> None:
        """Settings that may have a value per iteration: equal ones are one."""
        for name in names:
            values = _values(getattr(self, name))
            if len(values) not in (1, self.iterations):
                expected = f"one, or {self.iterations}: one per iteration, the text-only one first"
                raise InputError(Field(name), f" has {len(values)} values", expected=expected)
            object.__setattr__(self, name, values[0] if len(set(values)) == 1 else values)

    def _check_timesteps(self) -> None:
        steps = self.timesteps
        if any(step not in range(constants.TRAIN_STEPS) for step in steps) or any(map(ge, steps[1:], steps)):
            expected = f"whole numbers from {constants.TRAIN_STEPS - 1} to 0, each less than the one before"
            raise InputError(Field("timesteps"), f" is {','.join(map(str, steps))}", expected=expected)
        if self.steps not in (len(steps), constants.STEPS):
            also = (f"{len(steps)}, as many as ", Field("timesteps"), " has; leave it out")
            raise InputError(Field("steps"), f" is {self.steps}", expected=also)
        object.__setattr__(self, "timesteps", tuple(steps))
        object.__setattr__(self, "steps", len(steps))


def guided_calls(interval: tuple[float, float], steps: int, skipped: int = 0) -> range:
    """Which UNet calls lie in an interval of the steps, all of them in (0, 1); the first ones of these are skipped."""
    low, high = (max(0, round(share * steps) - skipped) for share in interval)
    return range(low, high)


def last_calls(steps: int, strength: float) -> int:
    """How many of so many steps are run at this strength, as in diffusers' image-to-image pipelines."""
    return min(int(steps * strength), steps)


def _values(setting: Any) -> tuple[Any, ...]:
    return tuple(setting) if isinstance(setting, tuple | list) else (setting,)


def split_evenly(frames: int, max_frames: int, workers: int = 1) -> tuple[range, ...]:
    """Micro-batches of at most `max_frames` whose sizes differ by one at most: 7 by 4 → 4 + 3, 10 by 8 → 5 + 5.

    As many for each worker, so that all end together, as long as there are frames: 10 by 8 for 4 → 3 + 3 + 2 + 2.
    """
    batches = min(frames, -(-frames // (max_frames * workers)) * workers)
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
