"""Whole stories: the pipeline that `run` uses, and the same iterations one thing after the other."""

import gc
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from storyadapter.bench.environment import watch
from storyadapter.bench.psnr import psnr_of_each
from storyadapter.bench.throughput.cases import StoryCase
from storyadapter.bench.throughput.inputs import SEED, prompts
from storyadapter.bench.timing import Result, measure_run
from storyadapter.method import constants
from storyadapter.method.errors import RunError
from storyadapter.method.events import FrameFinished, MicroBatchHalved, RunFinished, RunStarted
from storyadapter.method.noise import draw_noise
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.method.sampler import sampler_of
from storyadapter.method.story import Story
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import TEXTS_AT_ONCE, TextCache, Tokenizers
from storyadapter.runtime.denoising import FrameRows, SamplerInputs, StatePool
from storyadapter.runtime.jobs import TextGroup
from storyadapter.runtime.pictures import decode_latents, embed_pictures, to_picture
from storyadapter.runtime.pipeline import StoryPipeline
from storyadapter.runtime.reference_bank import NO_REFERENCES, BankRow, project


@dataclass(frozen=True)
class Drawn:
    """A story that was drawn: its last iteration, seconds by stage, the VAE's precision, frames of a micro-batch."""

    pictures: list[Image.Image]
    stages: dict[str, float]
    vae_precision: str
    at_once: int


# (settings, frames) -> what was drawn
Draw = Callable[[RunPlan, int], Drawn]


@dataclass(frozen=True)
class StoryResult:
    """What was found of one whole story.

    Attributes:
        case: its name.
        way: "one after the other" or "overlapped".
        vae_precision: and where the VAE runs.
        seconds: of the whole run, from prompts to pictures.
        stages: seconds by stage; where stages overlap, their sum is more than `seconds`.
        frames: of the story; drawn: in all iterations; unet_rows: of all its UNet calls.
        psnr: dB of the last iteration's worst picture to the first way's; None for the first.
        same_vae: whether that had the same VAE.
        peak_bytes: most memory of the device in use by tensors; None on a CPU.
        at_once: frames of a micro-batch.
    """

    case: str
    way: str
    vae_precision: str
    seconds: float
    stages: dict[str, float]
    frames: int
    drawn: int
    unet_rows: int
    psnr: float | None
    same_vae: bool
    peak_bytes: int | None
    at_once: int
    load: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_frame(self) -> float:
        """Per frame of the story, all its iterations included."""
        return self.seconds / self.frames

    @property
    def rows_per_second(self) -> float:
        """UNet rows per second of the whole run."""
        return self.unet_rows / self.seconds


def plan_of(case: StoryCase, prediction_type: str) -> RunPlan:
    """The settings of a case."""
    return RunPlan(
        height=case.height,
        width=case.width,
        seed=SEED,
        scales=constants.reference_scales(case.iterations),
        steps=case.steps,
        prediction_type=prediction_type,
        max_frames=case.max_frames,
    )


def overlapped(networks: Networks, tokenizers: Tokenizers) -> Draw:
    """By the project's pipeline; one for all stories, as in a program that draws many."""
    pipeline = StoryPipeline(networks, (tokenizers.first, tokenizers.second))

    def draw(plan: RunPlan, frames: int) -> Drawn:
        pictures: dict[int, Image.Image] = {}
        stages: dict[str, float] = {}
        at_once = 0
        for event in pipeline.run(Story(tuple(prompts(frames)), style="none"), plan):
            match event:
                case RunStarted():
                    at_once = max(map(len, event.batches))
                case MicroBatchHalved():
                    at_once = event.max_frames
                case FrameFinished():
                    pictures[event.frame] = event.picture
                case RunFinished():
                    stages = dict(event.seconds)
        return Drawn([pictures[frame] for frame in range(frames)], stages, networks.numerics["vae_decoder"], at_once)

    return draw


def in_sequence(networks: Networks, tokenizers: Tokenizers) -> Draw:
    """The same iterations from the method's parts, each finished before the next begins."""
    # kept from story to story, as in the pipeline, so that graphs are recorded once
    states = StatePool(networks)

    def draw(plan: RunPlan, frames: int) -> Drawn:
        stages: dict[str, float] = defaultdict(float)

        def stage(name: str, work: Callable[[], Result]) -> Result:
            result, seconds = measure_run(work, networks.device)
            stages[name] += seconds
            return result

        scale = networks.geometry.pixels_per_latent
        table = sampler_of(plan.sampler)
        noise = draw_noise(plan.seed, plan.height // scale, plan.width // scale, table)
        sampler = SamplerInputs.upload(table, noise, networks.device)
        batches = split_evenly(frames, plan.max_frames or frames)
        groups = TextGroup.split([plan.negative_prompt, *prompts(frames)], TEXTS_AT_ONCE, plan.height, plan.width)
        places = [(group, index) for group in groups for index in range(len(group.texts))]

        def refer(references: list[Image.Image], scale: float | None) -> tuple[BankRow, BankRow]:
            if scale is None:
                return NO_REFERENCES, NO_REFERENCES
            embeddings = torch.cat([embed_pictures(networks, references[b.start : b.stop]) for b in batches])
            return project(networks, embeddings, scale), project(networks, torch.zeros_like(embeddings[:1]), scale)

        def latents_of(rows: list[FrameRows]) -> Tensor:
            state = states.take(rows, frames)
            state.load(rows)
            for _ in range(sampler.calls):
                state.advance()
            latents = state.x.clone()
            states.give(state)
            return latents

        negative, *texts = stage("text", lambda: TextCache(networks, tokenizers).take(places, len(places)))
        pictures: list[Image.Image] = []
        for iteration in range(plan.iterations):
            story, nothing = stage("references", partial(refer, pictures, plan.scale_of(iteration)))
            pictures = []
            for batch in batches:
                rows = [FrameRows(texts[n], story, sampler, negative, nothing, plan.guidance) for n in batch]
                latents = stage("denoise", partial(latents_of, rows))
                pictures += stage("decode", partial(_decode, networks, latents))
        return Drawn(pictures, dict(stages), networks.numerics["vae_decoder"], max(map(len, batches)))

    return draw


def _decode(networks: Networks, latents: Tensor) -> list[Image.Image]:
    pixels, finite = decode_latents(networks, latents)
    if not finite.all():
        raise RunError("a frame has values that are not finite")
    return [to_picture(frame) for frame in pixels.cpu()]


def measure_story(
    prepare: Callable[[Networks, Tokenizers], Draw],
    way: str,
    networks: Networks,
    tokenizers: Tokenizers,
    case: StoryCase,
    prediction_type: str,
    other: Drawn | None,
) -> tuple[StoryResult, Drawn]:
    """Draw a story once to warm up, with two steps, and once to be timed.

    As in a program that draws many: what is done once, recording graphs and measuring memory, is done in the first.

    Args:
        prepare: `overlapped` or `in_sequence`.
        other: the same story drawn otherwise, to be compared with.
    """
    device = networks.device
    plan = plan_of(case, prediction_type)
    warm_up = RunPlan(**{**plan.as_dict(), "steps": 2, "scales": plan.scales[:1]})
    with torch.inference_mode():
        # graphs are recorded anew, and the peak is that of both drawings: a replay's scratch memory isn't counted
        networks.run_step.forget()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        draw = prepare(networks, tokenizers)
        draw(warm_up, case.frames)
        gc.collect()
        with watch(device) as load:
            drawn, seconds = measure_run(lambda: draw(plan, case.frames), device)
    result = StoryResult(
        case=case.name,
        way=way,
        vae_precision=networks.numerics["vae_decoder"],
        seconds=seconds,
        stages=drawn.stages,
        frames=case.frames,
        drawn=case.drawn,
        unet_rows=case.unet_rows,
        psnr=None if other is None else min(psnr_of_each(drawn.pictures, other.pictures)),
        same_vae=other is None or other.vae_precision == drawn.vae_precision,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        at_once=drawn.at_once,
        load=load.as_data(),
    )
    return result, drawn
