"""Whole stories: the pipeline that `run` uses, and the same iterations one thing after the other."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from storyadapter.bench.environment import watch
from storyadapter.bench.throughput.cases import StoryCase
from storyadapter.bench.throughput.inputs import SEED, prompts
from storyadapter.bench.timing import measure_run
from storyadapter.method import constants
from storyadapter.method.events import Event, FrameFinished, MicroBatchHalved, RunFinished, RunStarted
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import NumberFormat
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.drive import drive
from storyadapter.runtime.pipeline import StoryPipeline
from storyadapter.runtime.psnr import psnr_of_each
from storyadapter.runtime.story_source import StorySource


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
    """What was found of one whole story."""

    case: str  # its name
    way: str  # "one after the other", "overlapped" or "overlapped, fp8"
    vae_precision: str  # and where the VAE runs
    seconds: float  # of the whole run, from prompts to pictures
    stages: dict[str, float]  # seconds by stage; where stages overlap, their sum is more than `seconds`
    frames: int  # of the story
    drawn: int  # in all iterations
    unet_rows: int  # of all its UNet calls
    psnr: float | None  # dB of the last iteration's worst picture to the first way's; None for the first
    same_vae: bool  # whether that had the same VAE
    peak_bytes: int | None  # most memory of the device in use by tensors; None on a CPU
    at_once: int  # frames of a micro-batch
    load: dict[str, float] = field(default_factory=dict)
    number_format: NumberFormat | None = None  # of a quantized denoiser

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
    sizes: dict[str, Any] = {name: getattr(case, name) for name in ("height", "width", "steps", "max_frames")}
    scales = constants.reference_scales(case.iterations)
    return RunPlan(seed=SEED, scales=scales, prediction_type=prediction_type, prompt_chunks="1", **sizes)


def overlapped(networks: Networks, tokenizers: Tokenizers, *, overlap: bool | None = None) -> Draw:
    """By the project's pipeline; one for all stories, as in a program that draws many."""
    pipeline = StoryPipeline(networks, (tokenizers.first, tokenizers.second), overlapped=overlap)

    def draw(plan: RunPlan, frames: int) -> Drawn:
        return _read(pipeline.run(Story(tuple(prompts(frames)), style="none"), plan), networks)

    return draw


# the same, but a batch is decoded and embedded before the next is begun
in_sequence = partial(overlapped, overlap=False)


def as_two_stories(networks: Networks, tokenizers: Tokenizers) -> Draw:
    """As many frames, but half of them of one story and half of another, with a seed of its own, drawn together."""
    pipeline = StoryPipeline(networks, (tokenizers.first, tokenizers.second))

    def draw(plan: RunPlan, frames: int) -> Drawn:
        words = prompts(frames)
        halves = (words[: frames // 2], words[frames // 2 :])
        sources = [
            pipeline.source(Story(tuple(half), style="none"), replace(plan, seed=plan.seed + number))
            for number, half in enumerate(halves)
        ]
        told: dict[StorySource, list[Event]] = {source: [] for source in sources}
        for source, event in drive(pipeline.workers(), sources):
            told[source].append(event)
        first, second = (_read(events, networks) for events in told.values())
        stages = {stage: seconds + second.stages[stage] for stage, seconds in first.stages.items()}
        return Drawn(first.pictures + second.pictures, stages, first.vae_precision, first.at_once + second.at_once)

    return draw


def _read(events: Iterable[Event], networks: Networks) -> Drawn:
    pictures: dict[int, Image.Image] = {}
    stages: dict[str, float] = {}
    at_once = 0
    for event in events:
        match event:
            case RunStarted():
                at_once = max(map(len, event.batches))
            case MicroBatchHalved():
                at_once = event.max_frames
            case FrameFinished():
                pictures[event.frame] = event.picture
            case RunFinished():
                stages = dict(event.seconds)
    last = [pictures[frame] for frame in sorted(pictures)]
    return Drawn(last, stages, networks.numerics["vae_decoder"], at_once)


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
        prepare: `overlapped`, `in_sequence` or `as_two_stories`.
        other: the same story drawn otherwise, to be compared with.
    """
    device = networks.device
    plan = plan_of(case, prediction_type)
    warm_up = replace(plan, steps=2, scales=plan.scales[:1])
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
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    psnr = None if other is None else min(psnr_of_each(drawn.pictures, other.pictures))
    same_vae = other is None or other.vae_precision == drawn.vae_precision
    result = partial(StoryResult, case.name, way, drawn.vae_precision, seconds, drawn.stages, case.frames)
    quantization = networks.numerics.quantization
    number_format = quantization.number_format if quantization else None
    found = result(case.drawn, case.unet_rows, psnr, same_vae, peak, drawn.at_once, load.as_data(), number_format)
    return found, drawn
