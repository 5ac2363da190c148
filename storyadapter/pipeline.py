"""The iterations of Story-Adapter over networks that a backend gives. Imports no backend."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from storyadapter import method
from storyadapter.conditioning import TextConditioning, Tokenizers, encode_text
from storyadapter.denoising import denoise
from storyadapter.errors import InputError, RunError
from storyadapter.events import (
    Event,
    FrameFinished,
    IterationFinished,
    IterationStarted,
    PromptTruncated,
    RunFinished,
    RunStarted,
    StepFinished,
)
from storyadapter.networks import Networks, idle_inputs
from storyadapter.noise import Noise, draw_noise
from storyadapter.pictures import decode_latents, embed_pictures, to_pictures
from storyadapter.plan import RunPlan, split_evenly
from storyadapter.reference_bank import ReferenceBank
from storyadapter.sampler import SamplerTable, build_sampler
from storyadapter.story import Story

_SLOW_CALL = 5.0  # seconds


@dataclass(frozen=True)
class FinishedIteration:
    """Where a stopped run goes on: all pictures of its last finished iteration, in story order."""

    iteration: int
    pictures: Sequence[Image.Image]


@dataclass
class StageClock:
    """Wall-clock seconds by stage; waits for the device at the end of a stage, so that a stage owns its work."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class StoryPipeline:
    """Draws stories; holds no state between runs.

    Args:
        networks: the seven networks, from `storyadapter.engine.open_networks`.
        tokenizers: of text encoder 1 and 2 of the same checkpoint, from `Checkpoint.load_tokenizers`.
    """

    def __init__(self, networks: Networks, tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]) -> None:
        self.networks = networks
        self.tokenizers = Tokenizers(*tokenizers)

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
        clock = StageClock(networks.device)
        for name in ("warm-up", "call"):
            with clock.stage(name):
                networks.denoiser(inputs)
            if clock.seconds[name] > _SLOW_CALL:
                break
        return clock.seconds[name] / rows

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
            text = encode_text(
                networks,
                self.tokenizers,
                prompts,
                negative_prompt=plan.negative_prompt if plan.guided else None,
                height=plan.height,
                width=plan.width,
            )
        noise = draw_noise(plan.seed, plan.height // scale, plan.width // scale, table)
        pictures = list(resume.pictures) if resume else []
        for iteration in range(first, plan.iterations):
            clock = StageClock(networks.device)
            references, pictures = pictures, []
            for event in self._iteration(iteration, references, text, plan, table, noise, batches, clock):
                if isinstance(event, FrameFinished):
                    pictures.append(event.picture)
                yield event
            for stage, seconds in clock.seconds.items():
                total.seconds[stage] = total.seconds.get(stage, 0.0) + seconds
            yield IterationFinished(iteration, clock.seconds)
        yield RunFinished(total.seconds)

    def _iteration(
        self,
        iteration: int,
        references: Sequence[Image.Image],
        text: TextConditioning,
        plan: RunPlan,
        table: SamplerTable,
        noise: Noise,
        batches: Sequence[range],
        clock: StageClock,
    ) -> Iterator[Event]:
        networks, scale = self.networks, plan.scale_of(iteration)
        yield IterationStarted(iteration, scale)
        with torch.inference_mode(), clock.stage("references"):
            if scale is None:
                bank = ReferenceBank.empty(networks)
            else:
                bank = ReferenceBank.project(networks, embed_pictures(networks, references), scale)
        for batch in batches:
            latents = torch.empty(0)
            with torch.inference_mode(), clock.stage("denoise"):
                bound = text.bind(batch)
                steps = denoise(networks, bound, bank, table, noise, frames=len(batch), guidance=plan.guidance)
            for call in range(1, table.calls + 1):
                with torch.inference_mode(), clock.stage("denoise"):
                    latents = next(steps)
                yield StepFinished(iteration, batch, call, table.calls)
            with torch.inference_mode(), clock.stage("decode"):
                image = decode_latents(networks, latents)
            for frame, drawn, decoded in zip(batch, latents, image, strict=True):
                if not decoded.isfinite().all():
                    # one bad reference would poison every frame of the next iteration
                    in_vae = bool(drawn.isfinite().all())
                    option = "--vae-precision" if in_vae else "--precision"
                    raise RunError(
                        f"iteration {iteration}, frame {frame}: the {'VAE' if in_vae else 'UNet'} gave values that are "
                        f"not finite in {networks.vae_precision if in_vae else networks.precision}; try {option} bf16 "
                        "or fp32, with another --out"
                    )
            for frame, picture in zip(batch, to_pictures(image), strict=True):
                yield FrameFinished(iteration, frame, scale, picture)
