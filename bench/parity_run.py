"""How far a backend's pictures are from those of eager in fp32, iteration by iteration.

Same references: each iteration is drawn from eager's pictures of the iteration before, so what differs was made in this
one iteration. Free-running: the backend draws all iterations by itself, so each one adds to the differences of those
before; two right ways to compute may drift apart, so nothing is asked of these.
"""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from PIL import Image

from storyadapter.bench.environment import describe
from storyadapter.bench.model import BenchmarkModel, usual_ranges
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import Progress, opening, table
from storyadapter.demo.held_out import held_out_stories
from storyadapter.engine.backends import BACKENDS
from storyadapter.method.errors import InputError
from storyadapter.method.events import frames_by_iteration
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.pipeline import FinishedIteration, StoryPipeline
from storyadapter.runtime.psnr import EQUAL, MIN_MEDIAN_PSNR, MIN_PSNR, in_words, passes, psnr_of_each

Pictures = list[list[Image.Image]]  # [iteration][frame]


@dataclass(frozen=True)
class Iteration:
    """One iteration: dB of every frame to eager's, in story order."""

    scale: float | None  # its λ; None in iteration 0, which has no references, and whose two lists are one drawing
    same_references: Sequence[float]  # drawn from eager's pictures of the iteration before
    free_running: Sequence[float]  # drawn from the backend's own


@dataclass(frozen=True)
class ParityReport:
    """A whole comparison; `problems` is empty where it passed."""

    environment: dict[str, str]
    model: str
    backend: str
    precision: str
    vae_precision: str
    device: str
    plan: RunPlan
    iterations: Sequence[Iteration]  # from the text-only one on
    # dB of the last iteration, drawn from eager's pictures with half its λ, which must not pass
    control: Sequence[float]
    problems: Sequence[str]


@dataclass(frozen=True)
class Drawer:
    """Draws one story on one backend, and tells how far it is; `name` is the backend's for people."""

    name: str
    pipeline: StoryPipeline
    story: Story
    progress: Progress

    def called(self, way: str) -> Self:
        """The same, which tells in what way it draws."""
        return dataclasses.replace(self, name=f"{self.name}, {way}")

    def draw(self, plan: RunPlan, resume: FinishedIteration | None = None) -> Pictures:
        """Every iteration that is left, each from the pictures of the one before."""
        drawn: Pictures = []
        events = self.pipeline.run(self.story, plan, resume=resume)
        for frames in frames_by_iteration(
            events, lambda number: self.progress.begin(f"{self.name}: iteration {number}")
        ):
            drawn.append(frames)
            self.progress.done(f"{len(frames)} frames drawn")
        return drawn

    def draw_from(self, references: Pictures, iteration: int, plan: RunPlan) -> list[Image.Image]:
        """One iteration after the first, from other pictures of the iteration before."""
        until = dataclasses.replace(plan, scales=plan.scales[:iteration])
        (drawn,) = self.draw(until, FinishedIteration(iteration - 1, references[iteration - 1]))
        return drawn


def compare(args: argparse.Namespace) -> ParityReport:
    """Draw the story by eager, and by the backend in both ways; see `parity.run`."""
    engine = EngineChoice.typed(args)
    if not BACKENDS[engine.backend].builds and engine.precision == "fp32":
        raise InputError("eager in fp32 is what others are compared with; expected another --backend or --precision")
    model = BenchmarkModel.typed(args, engine)
    settings = {name: getattr(args, name) for name in ("iterations", "seed", "steps", "max_frames")}
    plan = model.plan(**settings)
    story = Story(tuple(held_out_stories(1, args.frames)[0].prompts), style="none")
    progress = Progress(3 * args.iterations + 3)
    name, vae = f"{engine.backend} {engine.precision}", model.numerics["vae_decoder"]
    progress.tell(f"{model.label}: {name} (VAE {vae}) against eager fp32, on {model.device}")
    ranges = usual_ranges(model.checkpoint.geometry, args.max_frames, args.frames)
    # opened first: what can't be had or built is told before anything is drawn
    networks = model.open(ranges, progress.tell).networks
    expected = _draw_reference(model, plan, story, progress)
    iterations, control = measure(Drawer(name, model.pipeline(networks), story, progress), plan, expected)
    facts = (describe(model.device, args.commit), model.label, engine.backend, engine.precision, vae)
    return ParityReport(*facts, str(networks.device), plan, iterations, control, problems_of(iterations, control))


def measure(drawer: Drawer, plan: RunPlan, expected: Pictures) -> tuple[list[Iteration], list[float]]:
    """Draw all iterations in both ways, and the control.

    Args:
        plan: with which eager drew.
        expected: eager's pictures.

    Returns:
        The iterations, and dB of the control's frames; see `ParityReport`.
    """
    free = drawer.called("free-running").draw(plan)
    last = plan.iterations - 1
    from_same = drawer.called("same references")
    same = [free[0], *(from_same.draw_from(expected, iteration, plan) for iteration in range(1, last + 1))]
    halved = dataclasses.replace(plan, scales=(*plan.scales[:-1], plan.scales[-1] / 2))
    control = drawer.called("same references, half the λ").draw_from(expected, last, halved)
    iterations = [
        Iteration(plan.scale_of(number), psnr_of_each(same[number], pictures), psnr_of_each(free[number], pictures))
        for number, pictures in enumerate(expected)
    ]
    return iterations, psnr_of_each(control, expected[last])


def _draw_reference(model: BenchmarkModel, plan: RunPlan, story: Story, progress: Progress) -> Pictures:
    ranges = usual_ranges(model.checkpoint.geometry, 1, len(story.prompts))
    networks = model.open(ranges, progress.tell, "eager", Numerics("fp32")).networks
    # by default PyTorch rounds the factors of a GPU's convolutions to TF32, which has fp16's ten bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        drawn = Drawer("eager fp32", model.pipeline(networks), story, progress).draw(plan)
    gc.collect()
    return drawn


def problems_of(iterations: Sequence[Iteration], control: Sequence[float]) -> list[str]:
    """What is wrong, in words."""
    found = [
        f"iteration {number}, same references: {in_words(values)}"
        for number, values in enumerate(iteration.same_references for iteration in iterations)
        if not passes(values)
    ]
    if passes(control):
        found.append(f"half the λ passes too ({in_words(control)}): the comparison sees nothing")
    return found


def markdown(found: ParityReport) -> str:
    """The page."""
    plan, frames = found.plan, len(found.control)
    all_same = [value for iteration in found.iterations for value in iteration.same_references]
    facts = found.environment | {
        "pictures": f"{frames} frames of {plan.width}x{plan.height}, {plan.iterations} iterations, {plan.steps} steps, "
        f"seed {plan.seed}, at most {plan.max_frames} frames at once on {found.device}",
        "demanded": f"same references, each iteration: median {MIN_MEDIAN_PSNR:g} dB, worst {MIN_PSNR:g} dB or more",
        "same references": f"over all {len(all_same)} pictures {in_words(all_same)}",
        "control": f"the last iteration with half its λ, which must not pass: {in_words(found.control)}",
        "verdict": "; ".join(found.problems) or "passed",
    }
    rows = []
    for number, iteration in enumerate(found.iterations):
        scale = "none" if iteration.scale is None else f"{iteration.scale:g}"
        both = (iteration.same_references, iteration.free_running)
        rows.append([str(number), scale, *(f"{f(v):.1f}" for v in both for f in (statistics.median, min))])
    vae = "" if found.vae_precision == found.precision else f" (VAE {found.vae_precision})"
    title = f"Parity: {found.model}, {found.backend} {found.precision}{vae} against eager fp32"
    text = (
        f"PSNR in dB of a frame to eager's; {EQUAL:g}: equal. Same references: drawn from eager's pictures of the",
        "iteration before. Free-running: from the backend's own, so that differences add up. Iteration 0 has none.",
        "",
    )
    header = ["iteration", "λ", "same: median", "worst", "free-running: median", "worst"]
    return "\n".join([*opening(title, facts, *text), *table(header, rows)]) + "\n"
