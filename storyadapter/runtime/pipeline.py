"""The iterations of Story-Adapter over networks that a backend gives. Imports no backend."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import psutil
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from storyadapter.method.errors import Field, InputError
from storyadapter.method.events import Event, IterationFinished, PromptTruncated, RunFinished, RunStarted
from storyadapter.method.noise import draw_noise
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.method.sampler import SamplerTable, sampler_of
from storyadapter.method.story import Story
from storyadapter.model.contract import Range
from storyadapter.model.networks import Networks, idle_inputs
from storyadapter.runtime.clock import StageClock
from storyadapter.runtime.conditioning import StoryText, Tokenizers
from storyadapter.runtime.decoding import FrameDecoder
from storyadapter.runtime.denoising import LoopBuffers, LoopInputs
from storyadapter.runtime.memory import Batching, choose_batching, release_memory, unet_letters
from storyadapter.runtime.story_run import StoryRun

_SLOW_CALL = 5.0  # seconds
_BATCHINGS_AT_MOST = 64


@dataclass(frozen=True)
class FinishedIteration:
    """Where a stopped run goes on: all pictures of its last finished iteration, in story order."""

    iteration: int
    pictures: Sequence[Image.Image]


class StoryPipeline:
    """Draws stories. Between runs it keeps nothing but buffers, so that equal shapes find the same memory again.

    Args:
        networks: the seven networks, from `storyadapter.engine.open_networks`.
        tokenizers: of text encoder 1 and 2 of the same checkpoint, from `Checkpoint.load_tokenizers`.
        overlapped: whether decoding and what follows on it go on beside the UNet's work on the next micro-batch; by
            default on a GPU alone, as there is nothing to gain on a CPU.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
        *,
        overlapped: bool | None = None,
    ) -> None:
        self.networks = networks
        self.tokenizers = Tokenizers(*tokenizers)
        self.overlapped = networks.device.type == "cuda" if overlapped is None else overlapped
        self._buffers = LoopBuffers(networks)
        self._batchings: dict[tuple[object, ...], Batching] = {}

    def run(
        self, story: Story, plan: RunPlan, *, style: str | None = None, resume: FinishedIteration | None = None
    ) -> Generator[Event, None, None]:
        """Draw a story, iteration by iteration.

        Args:
            story: prompts, characters and style.
            plan: every other setting.
            style: overrides the story's style.
            resume: go on after this finished iteration; the pictures are those of an uninterrupted run.

        Yields:
            Events; `FrameFinished` carries the pictures.

        Raises:
            InputError: before the first event, where the engine can't serve the plan, or `resume` is of another story.
            RunError: a frame came out with values that aren't finite.
        """
        frames = len(story.prompts)
        self._check(plan, frames)
        if resume is not None and len(resume.pictures) != frames:
            raise InputError(f"a finished iteration has {len(resume.pictures)} pictures; expected the story's {frames}")
        table = sampler_of(plan)
        prompts = story.final_prompts(style)
        return self._events(prompts, plan, table, resume)

    def batching(self, plan: RunPlan, frames: int) -> Batching:
        """How a story of so many frames is split into micro-batches here.

        On a GPU this follows from the memory that is free, measured once per pipeline and size of story, so that a
        story that is drawn again is split as before.

        Raises:
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        key = (plan.height, plan.width, plan.guided, bool(plan.scales), plan.max_frames, frames)
        if key not in self._batchings:
            if self.networks.device.type == "cuda":
                release_memory(self.networks, self._buffers)
            self._batchings[key] = choose_batching(self.networks, plan, frames)
            if len(self._batchings) > _BATCHINGS_AT_MOST:
                self._batchings.pop(next(iter(self._batchings)))
        return self._batchings[key]

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

    def _check(self, plan: RunPlan, frames: int) -> None:
        letters, scale = self.networks.letters, self.networks.geometry.pixels_per_latent
        if letters is None:
            return
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
                named = ("the story's frames (", Field(name), ")") if name == "max_references" else Field(name)
                served = f"this engine was built for {built.minimum} to {built.maximum}"
                raise InputError(named, f": {asked} asked for", advice=served)

    def _events(
        self, prompts: Sequence[str], plan: RunPlan, table: SamplerTable, resume: FinishedIteration | None
    ) -> Generator[Event, None, None]:
        networks, scale = self.networks, self.networks.geometry.pixels_per_latent
        total = StageClock(networks.device)
        batching = self.batching(plan, len(prompts))
        batches = split_evenly(len(prompts), batching.max_frames)
        first = resume.iteration + 1 if resume else 0
        yield RunStarted(len(prompts), plan.iterations, first, batches, batching.keep_text)
        for frame, prompt in enumerate(prompts):
            if words := self.tokenizers.words_cut_off(prompt):
                yield PromptTruncated(frame, words)
        with torch.inference_mode(), total.stage("text"):
            text = StoryText(
                networks,
                self.tokenizers,
                prompts,
                negative_prompt=plan.negative_prompt if plan.guided else None,
                height=plan.height,
                width=plan.width,
                keep=batching.keep_text,
            )
            noise = draw_noise(plan.seed, plan.height // scale, plan.width // scale, table)
            loop = LoopInputs.upload(table, noise, plan.guidance, networks.device)
        decoder = FrameDecoder(networks, chunk=batching.decode_frames, overlapped=self.overlapped)
        run = StoryRun(networks, self._buffers, plan, len(prompts), loop, text, decoder, batching.max_frames, total)
        stages: dict[str, float] = {}
        try:
            for event in run.iterate(first, resume.pictures if resume else ()):
                if isinstance(event, IterationFinished):
                    for stage, seconds in event.seconds.items():
                        stages[stage] = stages.get(stage, 0.0) + seconds
                yield event
        finally:
            decoder.close()
        yield RunFinished(total.seconds() | stages)
