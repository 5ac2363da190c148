"""What a run tells while it goes on, one typed event at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class PromptTruncated:
    """A text is longer than 77 tokens; `words` is its end, which the model won't read.

    `negative`: whether it is a negative prompt; `frame` is None for that of the whole story.
    """

    frame: int | None
    words: str
    negative: bool = False


@dataclass(frozen=True)
class RunStarted:
    """The first event.

    `batches`: the frames of each batch of an iteration, in an edit counted among those that are drawn. `text_kept`:
    whether the projected text of the whole story stays in memory; if not, it is computed again for each batch. `left`:
    frames to be drawn, in all iterations; `rows`: those of all their UNet calls.
    """

    frames: int
    iterations: int
    first_iteration: int
    batches: tuple[range, ...]
    text_kept: bool = True
    left: int = 0
    rows: int = 0


@dataclass(frozen=True)
class IterationStarted:
    """`scale` is λ, None for the text-only iteration; `found`: frames that were drawn before and stay as they are."""

    iteration: int
    scale: float | None
    found: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepFinished:
    """One UNet call with these frames is done: `step` of `steps`, counted from 1."""

    iteration: int
    frames: Sequence[int]
    step: int
    steps: int


@dataclass(frozen=True)
class MicroBatchHalved:
    """The memory didn't suffice for these frames at once; the rest is drawn with at most `max_frames` at once."""

    iteration: int
    frames: Sequence[int]
    max_frames: int


@dataclass(frozen=True)
class FrameFinished:
    """A frame of an iteration is drawn.

    `key`: of its job. `embedding`: its CLIP embedding, a tensor [width] fp32 on the CPU, and `latents`, a tensor
    [4, h, w] fp16 on the CPU, where a later iteration reads them. `decoded_again`: whether it was decoded in fp32, as
    the VAE's values weren't finite in its own precision.
    """

    iteration: int
    frame: int
    scale: float | None
    picture: Image.Image
    key: str = ""
    embedding: Any = None
    latents: Any = None
    decoded_again: bool = False


@dataclass(frozen=True)
class IterationFinished:
    """All frames of an iteration are drawn.

    `seconds`: by stage ("references", "denoise", "decode"), of batches that were shared with other stories the share of
    this one; on a GPU stages overlap. `batches`: the frames of this story that were drawn together. `decoded_again`:
    see `FrameFinished`.
    """

    iteration: int
    seconds: dict[str, float]
    batches: tuple[Sequence[int], ...] = ()
    decoded_again: tuple[int, ...] = ()


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


def frames_by_iteration(
    events: Iterable[Event], begin: Callable[[int], object] | None = None
) -> Iterator[list[Image.Image]]:
    """The frames of each iteration in story order, when it ends; `begin` is told the number of each that begins."""
    frames: dict[int, Image.Image] = {}
    for event in events:
        match event:
            case IterationStarted() if begin is not None:
                begin(event.iteration)
            case FrameFinished():
                frames[event.frame] = event.picture
            case IterationFinished():
                yield [frames.pop(frame) for frame in sorted(frames)]
