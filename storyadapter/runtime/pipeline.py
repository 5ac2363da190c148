"""One story after the other: the simple face of the runtime. Imports no backend."""

import time
from collections.abc import Generator

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from storyadapter.method.errors import Field, InputError
from storyadapter.method.events import Event
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.method.sampler import sampler_of
from storyadapter.method.story import Story
from storyadapter.model.contract import Range
from storyadapter.model.networks import Networks, idle_inputs
from storyadapter.runtime.conditioning import TEXTS_AT_ONCE, Tokenizers
from storyadapter.runtime.denoising import StatePool
from storyadapter.runtime.drive import drive
from storyadapter.runtime.frame_store import FrameStore
from storyadapter.runtime.memory import Batching, Batchings, unet_letters
from storyadapter.runtime.story_source import FinishedIteration, StorySource
from storyadapter.runtime.worker import Worker

_SLOW_CALL = 5.0  # seconds


class StoryPipeline:
    """Draws stories. Between runs it keeps nothing but buffers, so that equal shapes find the same memory again.

    Args:
        networks: of one model, from `storyadapter.engine.open_networks`.
        tokenizers: of text encoder 1 and 2 of the same checkpoint, from `Checkpoint.load_tokenizers`.
        model: key of the model's files, which becomes part of the keys of what is drawn.
        overlapped: whether decoding and what follows on it go on beside the UNet's work on the next batch; by default
            on a GPU alone, as there is nothing to gain on a CPU.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
        *,
        model: str = "",
        overlapped: bool | None = None,
    ) -> None:
        self.networks = networks
        self.tokenizers = Tokenizers(*tokenizers)
        self.model = model
        self.overlapped = overlapped
        self._states = StatePool(networks)
        self._batchings = Batchings(networks, self._states)

    def run(
        self,
        story: Story,
        plan: RunPlan,
        *,
        style: str | None = None,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
    ) -> Generator[Event, None, None]:
        """Draw a story, iteration by iteration.

        Args:
            story: prompts, characters and style.
            plan: every other setting.
            style: overrides the story's style.
            resume: go on after this finished iteration; the pictures are those of an uninterrupted run.
            store: keeps frames; what it has already isn't drawn again.

        Yields:
            Events; `FrameFinished` carries the pictures.

        Raises:
            InputError: before the first event, where the engine can't serve the plan, or `resume` is of another story.
            RunError: a frame came out with values that aren't finite, or can't be kept.
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        check_request(self.networks, story, plan, resume)
        return self._events(story, plan, style, resume, store)

    def source(
        self,
        story: Story,
        plan: RunPlan,
        style: str | None = None,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
    ) -> StorySource:
        """A story's frames as jobs, for a scheduler; `check_request` comes before."""
        letters = self.networks.letters
        return StorySource(
            story.final_prompts(style),
            plan,
            model=self.model,
            numerics=self.networks.numerics,
            tokenizers=self.tokenizers,
            batching=self.batching(plan, len(story.prompts)),
            texts_at_once=min(TEXTS_AT_ONCE, letters["P"].maximum) if letters else TEXTS_AT_ONCE,
            resume=resume,
            store=store,
        )

    def worker(self) -> Worker:
        """A worker on these networks; only one may be at work at a time."""
        return Worker(self.networks, self.tokenizers, self._states, overlapped=self.overlapped)

    def batching(self, plan: RunPlan, frames: int) -> Batching:
        """How a story of so many frames is split into batches here.

        On a GPU this follows from the memory that is free, measured once per pipeline and size of story, so that a
        story that is drawn again is split as before.

        Raises:
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        return self._batchings.take(plan, frames)

    def knows_batching(self, plan: RunPlan, frames: int) -> bool:
        """Whether `batching` needs no measurement, which nothing else may go on beside."""
        return self._batchings.is_known(plan, frames)

    def seconds_per_row(self, plan: RunPlan, frames: int, references: int) -> float:
        """Seconds of one row of a UNet call with so many frames and references, from one call after a warm-up.

        Good enough to tell a user how long a run will take; measurements are made by `storyadapter.bench`. Where a call
        takes so long that warming up hardly counts, the warm-up is what is timed.
        """
        while True:
            try:
                return self._timed_call(plan, frames, references)
            except torch.OutOfMemoryError:
                if frames == 1:
                    raise
            frames = -(-frames // 2)  # as a run does then

    def memory_in_use(self) -> int:
        """Bytes held now: of the GPU by this process's tensors, or of the process itself on a CPU."""
        if self.networks.device.type == "cuda":
            return torch.cuda.memory_allocated(self.networks.device)
        return psutil.Process().memory_info().rss

    def _timed_call(self, plan: RunPlan, frames: int, references: int) -> float:
        networks = self.networks
        letters = unet_letters(networks, plan, frames, references)
        inputs = idle_inputs(networks, "denoiser", letters)
        seconds = 0.0
        for _ in ("warm-up", "call"):
            start = time.perf_counter()
            networks["denoiser"](inputs)
            if networks.device.type == "cuda":
                torch.cuda.synchronize(networks.device)
            seconds = time.perf_counter() - start
            if seconds > _SLOW_CALL:
                break
        return seconds / letters["B"]

    def _events(
        self,
        story: Story,
        plan: RunPlan,
        style: str | None,
        resume: FinishedIteration | None,
        store: FrameStore | None,
    ) -> Generator[Event, None, None]:
        source = self.source(story, plan, style, resume, store)
        for _, event in drive(self.worker(), [source]):
            yield event


def check_request(networks: Networks, story: Story, plan: RunPlan, resume: FinishedIteration | None = None) -> None:
    """What can be told of a request before anything is drawn.

    Raises:
        InputError: the engine can't serve the plan, the sampler can't do it, or `resume` is of another story.
    """
    frames, letters, scale = len(story.prompts), networks.letters, networks.geometry.pixels_per_latent
    if letters is not None:
        height, width = (Range(letters[name].minimum * scale, letters[name].maximum * scale) for name in ("h", "w"))
        references = Range(1, letters["N"].maximum - 1)  # N counts the unconditional one too
        together = 1 if plan.max_frames is None else len(split_evenly(frames, plan.max_frames)[0])
        for name, asked, built in (
            ("max_frames", together, letters["F"]),
            ("max_references", plan.references(frames), references),
            ("height", plan.height, height),
            ("width", plan.width, width),
        ):
            if asked not in built:
                named = ("the story's frames (", Field(name), ")") if name == "max_references" else (Field(name),)
                served = f"this engine was built for {built.minimum} to {built.maximum}"
                raise InputError(*named, f": {asked} asked for", advice=served)
    if resume is not None and len(resume.pictures) != frames:
        raise InputError(f"a finished iteration has {len(resume.pictures)} pictures", expected=f"the story's {frames}")
    sampler_of(plan.sampler)
