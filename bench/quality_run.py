"""Held-out stories, drawn and judged; and measures of what the judge reads, with intervals by bootstrap over stories.

Labels are integers [stories, repeats, frames, traits]; a repeat is the same story with another seed. Every measure
gives one number per story (its repeats averaged), so that stories, the independent unit, are what is resampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storyadapter.bench.model import BenchmarkModel, usual_ranges
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import table
from storyadapter.checkpoint.paths import CheckpointPaths, LoraSpec
from storyadapter.cli.options import ModelChoice
from storyadapter.demo.held_out import PROMPTED, HeldOutStory, held_out_stories
from storyadapter.demo.judge import load_judge
from storyadapter.demo.vocabulary import IDENTITY_TRAITS, TRAITS
from storyadapter.engine.backend import default_device
from storyadapter.method import constants
from storyadapter.method.events import Event, FrameFinished, IterationFinished, RunFinished, frames_by_iteration
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.drive import drive
from storyadapter.runtime.pipeline import FinishedIteration, StoryPipeline
from storyadapter.runtime.story_source import StorySource

COLUMNS = list(TRAITS)
IDENTITY_COLUMNS = [COLUMNS.index(name) for name in IDENTITY_TRAITS]
PROMPT_COLUMNS = [COLUMNS.index(name) for name in PROMPTED]
LOSS_AT_MOST: Final = 0.02  # of consistency and of fidelity, at the lower end of a difference's interval


@dataclass(frozen=True)
class Estimate:
    """A mean over stories with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def is_as_good(*less_exact: Estimate) -> bool:
    """The rule for modes that draw other pictures, of differences to the exact one, paired over stories."""
    return min(difference.low for difference in less_exact) >= -LOSS_AT_MOST


@dataclass(frozen=True)
class IterationQuality:
    """Measures of one iteration."""

    consistency: Estimate
    fidelity: Estimate  # species, place and action all as prompted
    by_prompt: Mapping[str, Estimate]  # each of PROMPTED alone
    by_trait: Mapping[str, float]  # consistency of each identity trait
    diversity: Estimate  # how often frames of different stories disagree


@dataclass(frozen=True)
class Quality:
    """Measures of a set of stories. `own` and `control`: how well frames drawn with the story's own references, and
    with another story's, agree with the identity of the story's own last iteration."""

    iterations: tuple[IterationQuality, ...]
    chance: float  # consistency of frames with independent, evenly drawn identities
    own: Estimate
    control: Estimate

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Markdown: one row per iteration."""
        rows = [
            [n, row.consistency, row.fidelity, *(row.by_prompt[name] for name in PROMPTED), row.diversity]
            for n, row in enumerate(self.iterations)
        ]
        return "\n".join(table(["iteration", "consistency", "fidelity", *PROMPTED, "diversity"], rows))

    def holds(self) -> tuple[bool, bool]:
        """The method's claim: consistency rose (intervals apart); fidelity didn't fall (intervals overlap)."""
        first, last = self.iterations[0], self.iterations[-1]
        return first.consistency.high < last.consistency.low, last.fidelity.high >= first.fidelity.low


def judge(args: argparse.Namespace) -> tuple[Tensor, Quality]:
    """Draw the stories and measure them: all pictures, see `draw_by_pipeline`, and what was found."""
    stories = held_out_stories(args.stories, args.frames)
    drawn, control = (draw_batched if args.sampler == "batched" else draw_by_pipeline)(stories, args)
    truth = np.stack([story.truth for story in stories])
    return drawn, measure(read_labels(drawn), read_labels(control), truth)


def save_sheets(drawn: Tensor, folder: Path) -> None:
    """A sheet of the first drawing of each story: a row per iteration."""
    for number, pictures in enumerate(drawn[:, :, 0].unbind(1)):
        rows, columns, _, height, width = pictures.shape
        sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
        Image.fromarray(sheet.contiguous().numpy()).save(folder / f"story-{number:02d}.png")


def seed_of(story: int, repeat: int) -> int:
    """The seed of one drawing of one story."""
    return 1000 * (repeat + 1) + story


def read_labels(pictures: Tensor) -> np.ndarray:
    """What the judge reads off pictures uint8 [..., 3, H, W]: int64 [..., traits]."""
    lead = pictures.shape[:-3]
    judge = load_judge(device=default_device())
    return judge.read(pictures.flatten(0, len(lead) - 1)).unflatten(0, lead).numpy()


def demo_model(args: argparse.Namespace, *loras: LoraSpec) -> BenchmarkModel:
    """The model of the options, as they want it run, with LoRAs."""
    folder = args.model
    paths = CheckpointPaths(folder, folder / "image_encoder", folder / "ip-adapter.safetensors", loras=loras)
    return BenchmarkModel.from_files(ModelChoice(paths, str(args.model)), EngineChoice.typed(args), default_device())


def open_model(model: BenchmarkModel, args: argparse.Namespace, chunks: int = 1) -> StoryPipeline:
    """A model opened for the stories of the options, with prompts of so many chunks; its engine is built first where
    the store has none."""
    ranges = usual_ranges(model.checkpoint.geometry, args.max_frames, args.frames, chunks)
    return model.pipeline(model.open(ranges, lambda line: print(line, flush=True)).networks)


def draw_by_pipeline(stories: list[HeldOutStory], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [iterations, stories, seeds, frames, 3, H, W], and of the control [stories, seeds, …]."""
    drawer, before = Drawer.of(demo_model(args), stories, args), args.iterations - 1
    drawn = drawer.draw()
    others = {(n, k): FinishedIteration(before, drawn[(n + 1) % len(stories), k][before]) for n, k in drawn}
    (control,) = as_tensor(drawer.draw(others))
    return as_tensor(drawn), control


# by number of the story and of its drawing: the frames of each iteration
Drawings = dict[tuple[int, int], list[list[Image.Image]]]


class Drawer:
    """All drawings of all stories by one model, whose frames share micro-batches.

    Args:
        plans: of each drawing, by the number of the story and its own.
    """

    def __init__(
        self, pipeline: StoryPipeline, stories: Sequence[HeldOutStory], plans: Mapping[tuple[int, int], RunPlan]
    ) -> None:
        self._pipeline = pipeline
        told = [Story(tuple(story.prompts), style="none") for story in stories]
        self._stories = {place: (told[place[0]], plan) for place, plan in plans.items()}

    @classmethod
    def of(cls, model: BenchmarkModel, stories: list[HeldOutStory], args: argparse.Namespace) -> Self:
        """With the options' settings; the engine of the model is built first where the store has none."""
        settings = {"steps": args.steps, "guidance": args.guidance, "max_frames": args.max_frames}
        plans = {
            (n, k): model.plan(iterations=args.iterations, seed=seed_of(n, k), **settings)
            for n, k in product(range(len(stories)), range(args.seeds))
        }
        return cls(open_model(model, args), stories, plans)

    def draw(self, resume: Mapping[tuple[int, int], FinishedIteration] | None = None) -> Drawings:
        """All iterations, or those that come after these."""
        told: dict[StorySource, list[Event]] = {}
        for place, (story, plan) in self._stories.items():
            finished = resume[place] if resume else None
            self._pipeline.check(story, plan, resume=finished)
            told[self._pipeline.source(story, plan, resume=finished)] = []
        ended = 0
        for source, event in drive(self._pipeline.workers(), list(told)):
            if isinstance(event, FrameFinished | IterationFinished):
                told[source].append(event)
            elif isinstance(event, RunFinished):
                ended += 1
                print(f"{ended} of {len(told)} stories drawn", flush=True)
        return {
            place: list(frames_by_iteration(events)) for place, events in zip(self._stories, told.values(), strict=True)
        }


def as_tensor(drawn: Drawings) -> Tensor:
    """Pictures uint8 [iterations, stories, seeds, frames, 3, H, W]."""
    pixels = np.stack([np.array([[np.asarray(p) for p in frames] for frames in each]) for each in drawn.values()])
    seeds = 1 + max(repeat for _, repeat in drawn)
    return torch.from_numpy(pixels).movedim(-1, -3).unflatten(0, (-1, seeds)).movedim(2, 0)


def draw_batched(stories: list[HeldOutStory], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The same by the plain second implementation of the method."""
    from storyadapter.demo.training.batched import BatchedMethod

    drawer = BatchedMethod(args.model, str(default_device()), args.steps, args.guidance)
    prompts = [[story.prompts] * args.seeds for story in stories]
    seeds = [[seed_of(n, k) for k in range(args.seeds)] for n in range(len(stories))]
    return drawer.draw_stories(prompts, seeds, constants.reference_scales(args.iterations))


def measure(labels: np.ndarray, control: np.ndarray, truth: np.ndarray) -> Quality:
    """Measure drawn stories.

    Args:
        labels: what the judge read, [iterations, stories, repeats, frames, traits] in the order of `COLUMNS`.
        control: the last iteration drawn with the next story's references, [stories, repeats, frames, traits].
        truth: of `PROMPTED`, [stories, frames, 3].
    """
    rows = []
    for read in labels:
        identity, prompted = read[..., IDENTITY_COLUMNS], read[..., PROMPT_COLUMNS]
        right = accuracy(prompted, truth)
        rows.append(
            IterationQuality(
                consistency=bootstrap(consistency(identity)),
                fidelity=bootstrap(all_right(prompted, truth)),
                by_prompt={name: bootstrap(right[:, n]) for n, name in enumerate(PROMPTED)},
                by_trait={
                    name: float(consistency(identity[..., n : n + 1]).mean()) for n, name in enumerate(IDENTITY_TRAITS)
                },
                diversity=bootstrap_pairs(difference(identity)),
            )
        )
    last = labels[-1][..., IDENTITY_COLUMNS]
    before = labels[-2][..., IDENTITY_COLUMNS]
    return Quality(
        iterations=tuple(rows),
        chance=float(np.mean([1 / len(values) for values in IDENTITY_TRAITS.values()])),
        own=bootstrap(agreement(last, before)),
        control=bootstrap(agreement(control[..., IDENTITY_COLUMNS], before)),
    )


def consistency(labels: np.ndarray) -> np.ndarray:
    """How often two frames of one story agree in a trait: mean over pairs of frames and traits, float [stories].

    1: the same character in every frame; `chance` where every frame draws its own.
    """
    frames = labels.shape[2]
    if frames < 2:
        raise ValueError(f"consistency needs stories of 2 frames or more, got {frames}")
    same = labels[:, :, :, None] == labels[:, :, None, :]
    pairs = same.mean(-1).sum((2, 3)) - frames  # a frame agrees with itself
    return (pairs / (frames * (frames - 1))).mean(1)


def consistency_and_fidelity(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of frames that were read whole: `consistency` of who is in them, and `all_right` of what was prompted.

    Args:
        labels: [stories, repeats, frames, traits] in the order of `COLUMNS`.
        truth: of `PROMPTED`, [stories, frames, 3].
    """
    return consistency(labels[..., IDENTITY_COLUMNS]), all_right(labels[..., PROMPT_COLUMNS], truth)


def accuracy(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often a frame shows what its prompt says, float [stories, traits].

    Args:
        labels: [stories, repeats, frames, traits].
        truth: [stories, frames, traits].
    """
    return (labels == truth[:, None]).mean((1, 2))


def all_right(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often a frame shows everything that its prompt says, float [stories]; arguments as for `accuracy`."""
    return (labels == truth[:, None]).all(-1).mean((1, 2))


def difference(labels: np.ndarray) -> np.ndarray:
    """How often frames of two different stories disagree in a trait, float [stories, stories] (diagonal: nan).

    Falls to 0 for a model that draws one character for everything.
    """
    stories, traits = labels.shape[0], labels.shape[-1]
    pooled = labels.reshape(stories, -1, traits, 1)
    odds = (pooled == np.arange(labels.max() + 1)).mean(1)  # of each value, [stories, traits, values]
    agree = np.einsum("stv,rtv->sr", odds, odds) / traits
    np.fill_diagonal(agree, np.nan)
    return 1 - agree


def agreement(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How often a frame of `labels` agrees in a trait with a frame of `others`, the same story drawn in another way:
    float [stories]. Both [stories, repeats, frames, traits]; repeats are compared one to one."""
    same = labels[:, :, :, None] == others[:, :, None, :]
    return same.mean((1, 2, 3, 4))


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of one number per story, with the 2.5 % and 97.5 % points of the mean over resampled stories."""
    random = np.random.default_rng(seed)
    means = values[random.integers(len(values), size=(draws, len(values)))].mean(1)
    return Estimate(float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


def bootstrap_pairs(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """The same for one number per pair of stories [stories, stories]; a story with itself (nan) doesn't count."""
    random = np.random.default_rng(seed)
    means = []
    for at in random.integers(len(values), size=(draws, len(values))):
        if len(set(at)) > 1:
            means.append(np.nanmean(values[np.ix_(at, at)]))
    return Estimate(float(np.nanmean(values)), *(float(q) for q in np.quantile(means, (0.025, 0.975))))
