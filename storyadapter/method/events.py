"""What a run tells while it goes on, one typed event at a time."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class PromptTruncated:
    """A prompt is longer than 77 tokens; `words` is its end, which the model won't read."""

    frame: int
    words: str


@dataclass(frozen=True)
class RunStarted:
    """Text is about to be encoded.

    `batches`: the frames of each micro-batch of an iteration. `text_kept`: whether the projected text of the whole
    story stays in memory; if not, it is computed again for each micro-batch.
    """

    frames: int
    iterations: int
    first_iteration: int
    batches: tuple[range, ...]
    text_kept: bool = True


@dataclass(frozen=True)
class IterationStarted:
    """`scale` is λ, None for the text-only iteration."""

    iteration: int
    scale: float | None


@dataclass(frozen=True)
class StepFinished:
    """One UNet call of a micro-batch is done: `step` of `steps`, counted from 1."""

    iteration: int
    frames: range
    step: int
    steps: int


@dataclass(frozen=True)
class MicroBatchHalved:
    """The memory didn't suffice for these frames at once; the rest is drawn with at most `max_frames` at once."""

    iteration: int
    frames: range
    max_frames: int


@dataclass(frozen=True)
class FrameFinished:
    """A frame of an iteration is drawn."""

    iteration: int
    frame: int
    scale: float | None
    picture: Image.Image


@dataclass(frozen=True)
class IterationFinished:
    """All frames of an iteration are drawn.

    `seconds`: by stage ("references", "denoise", "decode"); on a GPU stages overlap. `batches`: the micro-batches that
    were drawn.
    """

    iteration: int
    seconds: dict[str, float]
    batches: tuple[range, ...] = ()


@dataclass(frozen=True)
class RunFinished:
    """The story is done. `seconds`: by stage, over the whole run, text included."""

    seconds: dict[str, float]


Event = (
    PromptTruncated
    | RunStarted
    | IterationStarted
    | StepFinished
    | MicroBatchHalved
    | FrameFinished
    | IterationFinished
    | RunFinished
)
