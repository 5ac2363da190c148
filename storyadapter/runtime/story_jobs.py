"""Which jobs a story means, iteration by iteration, and which of its texts the model won't read to the end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from storyadapter.method import constants
from storyadapter.method.control_pictures import Controls
from storyadapter.method.errors import Field, InputError, Text
from storyadapter.method.events import PromptTruncated
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import FinalFrame
from storyadapter.model.contract import DECODERS
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.jobs import Control, FrameJob, TextGroup

CUT: Final[Text] = (Field("prompt_chunks"), " 1 cuts texts at the end of the first")
TextPlace: TypeAlias = tuple[TextGroup, int]  # a group, and the index of a text in it


@dataclass(frozen=True)
class StoryJobs:
    """The jobs of a story.

    Attributes:
        frames: what decides each frame beside the plan.
        plan: every other setting.
        model: key of the model, as in `FrameJob`.
        numerics: of the networks.
        controls: of each frame its control pictures, as `read_controls` gives them.
    """

    frames: Sequence[FinalFrame]
    plan: RunPlan
    model: str
    numerics: Numerics
    controls: Controls

    @property
    def most_pictures(self) -> int:
        """Pictures of a user's that one frame attends to at the most."""
        return max(len(frame.references) for frame in self.frames)

    def of(self, iteration: int, before: Sequence[str]) -> list[FrameJob]:
        """One per frame.

        Args:
            before: keys of the frames of the iteration before, in story order; none for iteration 0.
        """
        plan = self.plan
        guided, guidance = plan.is_guided_in(iteration), plan.guidance_in(iteration)
        starts = before if iteration and plan.strength < 1 else (None,) * len(self.frames)
        return [
            FrameJob(
                self.model,
                self.numerics,
                *plan.size,
                frame.prompt,
                frame.negative_prompt if guided else None,
                guidance if guided or plan.embeds_guidance else None,
                plan.sampler_in(iteration),
                frame.seed,
                plan.scale_of(iteration) if iteration else plan.reference_scale if frame.references else None,
                (*before, *(frame.references if iteration == 0 or plan.keep_references else ())),
                plan.guidance_interval if guided else (0.0, 1.0),
                start,
                tuple(
                    Control(picture.key, use.scale, use.start, use.end) if picture else None
                    for picture, use in zip(pictures, plan.controls, strict=False)
                ),
                frame.chunks,
                DECODERS[plan.reference_vae and iteration + 1 < plan.iterations],
            )
            for frame, start, pictures in zip(self.frames, starts, self.controls, strict=True)
        ]


class StoryTexts:
    """The texts of a story in groups that follow from the story alone, those of equal chunks together.

    Args:
        at_once: texts of one chunk that are encoded in one call.

    Attributes:
        count: texts that are encoded: a prompt per frame, and the distinct negative prompts.
    """

    def __init__(self, frames: Sequence[FinalFrame], at_once: int, height: int, width: int) -> None:
        self.count = 0
        self._prompts: dict[int, TextPlace] = {}  # by frame
        self._negatives: dict[tuple[str, int], TextPlace] = {}  # by text and chunks
        for chunks in sorted({frame.chunks for frame in frames}):
            those = {number: frame for number, frame in enumerate(frames) if frame.chunks == chunks}
            negatives = dict.fromkeys(f.negative_prompt for f in those.values() if f.negative_prompt is not None)
            texts = [*negatives, *(frame.prompt for frame in those.values())]
            groups = TextGroup.split(texts, at_once, height, width, chunks)
            places = [(group, index) for group in groups for index in range(len(group.texts))]
            self._negatives |= {(text, chunks): place for text, place in zip(negatives, places, strict=False)}
            self._prompts |= dict(zip(those, places[len(negatives) :], strict=True))
            self.count += len(texts)

    def of(self, frame: int, job: FrameJob) -> tuple[TextPlace, ...]:
        """The places of a job's prompt and, with guidance, of its negative prompt."""
        negative = () if job.negative_prompt is None else (self._negatives[job.negative_prompt, job.chunks],)
        return self._prompts[frame], *negative


def in_chunks(frames: Sequence[FinalFrame], plan: RunPlan, tokenizers: Tokenizers) -> list[FinalFrame]:
    """The frames with as many chunks as their own texts fill, where the plan reads them whole.

    Raises:
        InputError: a text fills more than there may be.
    """
    if plan.prompt_chunks == "1":
        return list(frames)
    known: dict[str, int] = {}

    def chunks(number: int, text: str | None) -> int:
        if text is None:
            return 1
        if text not in known:
            known[text] = tokenizers.chunks(text)
            if known[text] > constants.MAX_PROMPT_CHUNKS:
                found = f"frame {number}: a text of {tokenizers.count(text):,} tokens fills {known[text]} chunks"
                most = f"at most {constants.MAX_PROMPT_CHUNKS}"
                raise InputError(found, expected=most, advice=CUT, field="prompts")
        return known[text]

    return [
        replace(frame, chunks=max(chunks(number, frame.prompt), chunks(number, frame.negative_prompt)))
        for number, frame in enumerate(frames)
    ]


def most_chunks(frames: Sequence[FinalFrame]) -> int:
    """Of the longest text."""
    return max(frame.chunks for frame in frames)


def truncated(frames: Sequence[FinalFrame], plan: RunPlan, tokenizers: Tokenizers) -> Iterator[PromptTruncated]:
    """Every text of a story of which the model won't read the end, each once."""
    if plan.prompt_chunks != "1":
        return
    for number, frame in enumerate(frames):
        if words := tokenizers.words_cut_off(frame.prompt):
            yield PromptTruncated(number, words)
    told = set()
    for number, frame in enumerate(frames):
        negative = frame.negative_prompt
        if negative is not None and negative not in told:
            told.add(negative)
            if words := tokenizers.words_cut_off(negative):
                yield PromptTruncated(None if negative == plan.negative_prompt else number, words, negative=True)
