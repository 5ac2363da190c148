"""A story in this process and by several workers, and stories sent to a server at once: seconds, rows, pictures."""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import httpx
from PIL import Image

from storyadapter import api
from storyadapter.bench.environment import describe
from storyadapter.bench.model import BenchmarkModel, usual_ranges
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import table
from storyadapter.bench.served import served
from storyadapter.bench.throughput.cases import PUBLISHED
from storyadapter.bench.throughput.inputs import SEED, prompts
from storyadapter.engine.backend import default_device
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import RunError
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.contract import ShapeRanges
from storyadapter.runtime.pipeline import Pipeline, StoryPipeline
from storyadapter.runtime.psnr import psnr_of_each
from storyadapter.serve.limits import Limits

_SERVED_SCALES: Final = 1  # iterations after the text-only one of a story that is sent to the server
_WARM_UP_STEPS: Final = 2


@dataclass(frozen=True)
class Drawn:
    """What was drawn, and how fast.

    Attributes:
        how: in which way, for people.
        stories, frames: how many stories at once, and of how many frames each.
        rows: of all UNet calls.
        ready_seconds: until all devices had opened the engine; 0 where they had before.
        seconds: of the drawing.
        psnr: dB of the worst picture of each iteration to those of the first way; empty where it isn't the same story.
    """

    how: str
    stories: int
    frames: int
    rows: int
    ready_seconds: float
    seconds: float
    psnr: list[float]

    @property
    def rate(self) -> float:
        """UNet rows per second."""
        return self.rows / self.seconds


@dataclass(frozen=True)
class WorkersReport:
    """What was measured; the first way is one story in this process."""

    environment: dict[str, str]
    model: str
    backend: str
    precision: str
    iterations: int
    steps: int
    max_frames: int
    is_full_size: bool
    drawn: list[Drawn]


Pictures = dict[tuple[int, int], Image.Image]


def open_here(size: str, engine: EngineChoice, ranges: ShapeRanges) -> StoryPipeline:
    """In an actor: the model of random weights on its device; its engine was built by the driver."""
    model = BenchmarkModel.synthetic(size, engine, default_device())
    return model.pipeline(
        open_networks(
            model.checkpoint,
            backend=engine.backend,
            numerics=model.numerics,
            ranges=ranges,
            engine_dir=engine.engine_dir,
        )
    )


def draw(pipeline: Pipeline, plan: RunPlan, frames: int) -> tuple[float, Pictures]:
    """One story of so many frames; seconds, and its pictures."""
    pictures: Pictures = {}
    started = time.perf_counter()
    for event in pipeline.run(Story(tuple(prompts(frames)), style="none"), plan):
        if isinstance(event, FrameFinished):
            pictures[event.iteration, event.frame] = event.picture
    return time.perf_counter() - started, pictures


def draw_served(address: str, plan: RunPlan, frames: int, stories: int) -> float:
    """So many stories of so many frames, sent at once; seconds until all have ended. Raises RunError: one failed."""
    settings = {"steps": plan.steps, "scales": plan.scales, "prediction_type": plan.prediction_type}

    def one(number: int) -> None:
        asked = {"prompts": prompts(frames), "settings": settings | {"seed": plan.seed + number}}
        with httpx.Client(base_url=address, timeout=None) as client:
            at = client.post("/v1/stories", json=asked).raise_for_status().headers["Location"]
            client.get(f"{at}/events").raise_for_status()  # it ends with the story
            told = client.get(at).raise_for_status().json()
        if told["state"] != "completed":
            raise RunError(f"a story that was sent to the server {told['state']}: {told['error']}")

    started = time.perf_counter()
    with ThreadPoolExecutor(stories) as threads:
        for ended in [threads.submit(one, number) for number in range(stories)]:
            ended.result()
    return time.perf_counter() - started


def measure(args: argparse.Namespace) -> WorkersReport:
    """See `bench workers`."""
    tell = partial(print, flush=True)
    engine = EngineChoice.typed(args).with_fast_vae()
    model = BenchmarkModel.synthetic(args.synthetic_weights, engine, default_device())
    ranges = usual_ranges(model.checkpoint.geometry, args.max_frames, args.frames)
    plan = model.plan(iterations=args.iterations, seed=SEED, steps=args.steps, max_frames=args.max_frames)
    drawn: list[Drawn] = []
    first: Pictures = {}

    def warm_up(plan: RunPlan) -> RunPlan:
        # with references too: the shapes of its calls are those that are measured
        return replace(plan, steps=_WARM_UP_STEPS)

    def note(found: Drawn) -> None:
        drawn.append(found)
        tell(
            f"{found.how}, {found.stories} x {found.frames} frames: ready in {found.ready_seconds:.1f} s, drawn in "
            f"{found.seconds:.2f} s, {found.rate:.2f} rows/s, {found.rate / drawn[0].rate:.3f} times the first"
        )

    def one_story(how: str, pipeline: Pipeline, ready: float) -> None:
        draw(pipeline, warm_up(plan), args.frames)
        seconds, pictures = draw(pipeline, plan, args.frames)
        first.update({} if first else pictures)
        psnr = []
        for iteration in range(plan.iterations):
            places = [(iteration, frame) for frame in range(args.frames)]
            psnr.append(min(psnr_of_each([pictures[at] for at in places], [first[at] for at in places])))
        note(Drawn(how, 1, args.frames, plan.unet_rows(args.frames), ready, seconds, psnr))

    started = time.perf_counter()
    opened = model.open(ranges, tell)
    here = model.pipeline(opened.networks)
    one_story("this process", here, time.perf_counter() - started - opened.build_seconds)
    for workers in args.workers:
        started = time.perf_counter()
        factory = partial(open_here, args.synthetic_weights, engine, ranges)
        with closing(api.open_ray(factory, model.tokenizers(), workers=workers, on_wait=tell)) as pipeline:
            tell(f"{workers} workers: the first has opened its engine")
            pipeline.wait_for_all()
            one_story(f"{workers} workers", pipeline, time.perf_counter() - started)
    frames = args.frames // args.stories
    shorter = replace(plan, scales=plan.scales[:_SERVED_SCALES])
    with TemporaryDirectory() as folder:
        limits = Limits(limit_frames=frames, limit_steps=max(args.steps, _WARM_UP_STEPS), limit_pixels=2**20)
        pixels = model.checkpoint.geometry.default_pixels
        with served(here, Path(folder), limits, pixels=pixels, max_frames=args.max_frames) as address:
            draw_served(address, warm_up(shorter), frames, args.stories)
            for stories in dict.fromkeys((1, args.stories)):
                seconds = draw_served(address, shorter, frames, stories)
                note(Drawn("a server here", stories, frames, stories * shorter.unet_rows(frames), 0, seconds, []))
    return WorkersReport(
        environment=describe(default_device(), args.commit),
        model=model.label,
        backend=engine.backend,
        precision=engine.precision,
        iterations=args.iterations,
        steps=args.steps,
        max_frames=args.max_frames,
        is_full_size=args.synthetic_weights == "sdxl",
        drawn=drawn,
    )


def markdown(found: WorkersReport) -> str:
    """The page."""
    one = found.drawn[0]
    rows = [
        (
            drawn.how,
            drawn.stories,
            drawn.frames,
            f"{drawn.ready_seconds:.1f}",
            f"{drawn.seconds:.2f}",
            f"{drawn.rate:.2f}",
            f"{drawn.rate / one.rate:.3f}",
            ", ".join(f"{psnr:.1f}" for psnr in drawn.psnr),
        )
        for drawn in found.drawn
    ]
    facts = [f"- {name}: {value}" for name, value in found.environment.items()]
    published = [
        f"{PUBLISHED.unet_rows / drawn.rate / 60:.1f} minutes by {drawn.how}" for drawn in found.drawn if drawn.psnr
    ]
    projection = (
        f"Projected at the rate of the same row, the published workload ({PUBLISHED.frames} frames, "
        f"{PUBLISHED.iterations} iterations, {PUBLISHED.steps} steps) takes {', '.join(published)}."
    )
    return "\n".join(
        [
            "# A story on one device and on several",
            "",
            f"{found.model}, {found.backend} {found.precision}: {found.iterations} iterations after the text-only one "
            f"(sent to the server: {min(_SERVED_SCALES, found.iterations)}), {found.steps} steps, at most "
            f"{found.max_frames} frames in a batch.",
            "",
            *facts,
            "",
            *table(
                ("drawn by", "stories", "frames each", "s until ready", "s", "rows/s", "times one", "worst PSNR, dB"),
                rows,
            ),
            *(["", projection] if found.is_full_size else []),
            "",
        ]
    )
