"""The iterations of Story-Adapter over networks that a backend gives. Imports no backend."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from storyadapter import method
from storyadapter.clock import StageClock
from storyadapter.conditioning import StoryText, Tokenizers
from storyadapter.decoding import FrameDecoder
from storyadapter.denoising import LoopBuffers, LoopInputs
from storyadapter.errors import InputError
from storyadapter.events import Event, IterationFinished, PromptTruncated, RunFinished, RunStarted
from storyadapter.networks import Networks, idle_inputs
from storyadapter.noise import draw_noise
from storyadapter.plan import RunPlan, split_evenly
from storyadapter.sampler import SamplerTable, build_sampler
from storyadapter.story import Story
from storyadapter.story_run import StoryRun

_SLOW_CALL = 5.0  # seconds
_DECODED_TOGETHER = 2  # frames, on a GPU: one fills it, and smaller parts come to the host earlier


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

    def run(
        self, story: Story, plan: RunPlan, *, style: str | None = None, resume: FinishedIteration | None = None
    ) -> Iterator[Event]:
        """Draw a story, iteration by iteration.

        Args:
            story: prompts, characters and style.
            plan: every other setting.
            style: overrides the story's style.
            resume: go on after this finished iteration; the pictures are those of an uninterrupted run.

        Yields:
            Events; `FrameFinished` carries the pictures.

        Raises:
            InputError: before the first event, where the engine can't serve the plan.
            RunError: a frame came out with values that aren't finite.
        """
        frames = len(story.prompts)
        self._check(plan, frames)
        table = build_sampler(plan.scheduler, plan.steps, plan.karras, plan.prediction_type)
        prompts = story.final_prompts(style)
        return self._events(prompts, plan, table, resume)

    def seconds_per_row(self, plan: RunPlan, frames: int, references: int) -> float:
        """Seconds of one row of a UNet call with so many frames and references, from one call after a warm-up.

        Good enough to tell a user how long a run will take; measurements are made by `storyadapter.bench`. Where a call
        takes so long that warming up hardly counts, the warm-up is what is timed.
        """
        networks, scale = self.networks, self.networks.geometry.pixels_per_latent
        rows = 2 * frames if plan.guided else frames
        letters = {
            "B": rows,
            "P": frames + int(plan.guided),
            "G": 2,
            "R": method.TOKENS_PER_IMAGE * references,
            "h": plan.height // scale,
            "w": plan.width // scale,
        }
        inputs = idle_inputs(networks, networks.denoiser.spec, letters)
        seconds = 0.0
        for _ in ("warm-up", "call"):
            start = time.perf_counter()
            networks.denoiser(inputs)
            if networks.device.type == "cuda":
                torch.cuda.synchronize(networks.device)
            seconds = time.perf_counter() - start
            if seconds > _SLOW_CALL:
                break
        return seconds / rows

    def memory_in_use(self) -> int:
        """Bytes held now: of the GPU by this process's tensors, or of the process itself on a CPU."""
        if self.networks.device.type == "cuda":
            return torch.cuda.memory_allocated(self.networks.device)
        return psutil.Process().memory_info().rss

    def _check(self, plan: RunPlan, frames: int) -> None:
        letters, scale = self.networks.letters, self.networks.geometry.pixels_per_latent
        if letters is None:
            return
        for option, letter, value, factor in (
            ("--max-frames", "F", len(split_evenly(frames, plan.max_frames)[0]), 1),
            ("the story's frames (--max-references)", "N", frames + 1 if plan.scales else 1, 1),
            ("--height", "h", plan.height // scale, scale),
            ("--width", "w", plan.width // scale, scale),
        ):
            if value not in letters[letter]:
                low, high = letters[letter].minimum * factor, letters[letter].maximum * factor
                raise InputError(f"{option}: {value * factor} asked for; this engine was built for {low} to {high}")

    def _events(
        self, prompts: Sequence[str], plan: RunPlan, table: SamplerTable, resume: FinishedIteration | None
    ) -> Iterator[Event]:
        networks, scale = self.networks, self.networks.geometry.pixels_per_latent
        total = StageClock(networks.device)
        batches = split_evenly(len(prompts), plan.max_frames)
        first = resume.iteration + 1 if resume else 0
        yield RunStarted(len(prompts), plan.iterations, first, batches)
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
            )
            noise = draw_noise(plan.seed, plan.height // scale, plan.width // scale, table)
            loop = LoopInputs.upload(table, noise, plan.guidance, networks.device)
        on_gpu = networks.device.type == "cuda"
        decoder = FrameDecoder(networks, chunk=_DECODED_TOGETHER if on_gpu else None, overlapped=self.overlapped)
        run = StoryRun(networks, self._buffers, plan, len(prompts), loop, text, decoder, plan.max_frames, total)
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
