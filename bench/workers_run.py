"""The same story in this process, by one worker and by several: seconds, rows per second, pictures."""

import argparse
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from PIL import Image

from storyadapter.bench.environment import describe
from storyadapter.bench.model import BenchmarkModel, usual_ranges
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.psnr import psnr_of_each
from storyadapter.bench.report import table
from storyadapter.bench.throughput.inputs import SEED, prompts
from storyadapter.engine.backend import default_device
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.contract import ShapeRanges
from storyadapter.runtime.executor import LocalExecutor
from storyadapter.runtime.pipeline import Pipeline, StoryPipeline

KIND: Final = "workers"


@dataclass(frozen=True)
class Drawn:
    """What was drawn; `psnr`: dB of the worst picture of each iteration to those of one story in this process."""

    workers: int  # 0: in this process
    stories: int
    ready_seconds: float  # until all of them had opened the engine
    seconds: float
    psnr: list[float]


@dataclass(frozen=True)
class WorkersReport:
    """What was measured; `rows`: of all UNet calls of the story."""

    environment: dict[str, str]
    model: str
    backend: str
    precision: str
    frames: int
    iterations: int
    steps: int
    max_frames: int
    rows: int
    drawn: list[Drawn]


def open_here(size: str, engine: EngineChoice, ranges: ShapeRanges) -> StoryPipeline:
    """In an actor: the model of random weights on its device."""
    model = BenchmarkModel.synthetic(size, engine, default_device())
    return model.pipeline(model.open(ranges, print).networks)


Pictures = dict[tuple[int, int], Image.Image]


def draw(pipeline: Pipeline, plan: RunPlan, frames: int, stories: int) -> Pictures:
    """So many frames, of one story or divided among several that are drawn together; pictures of the last."""
    pictures: Pictures = {}
    words = prompts(frames)
    with LocalExecutor(pipeline) as executor:
        submitted = [
            executor.submit(Story(tuple(words[number::stories]), style="none"), replace(plan, seed=plan.seed + number))
            for number in range(stories)
        ]
        for story in submitted:
            for event in story:
                if isinstance(event, FrameFinished):
                    pictures[event.iteration, event.frame] = event.picture
    return pictures


def measure(args: argparse.Namespace) -> WorkersReport:
    """See `bench workers`."""
    from storyadapter.runtime.ray_pipeline import RayPipeline

    engine = EngineChoice.typed(args).with_fast_vae()
    model = BenchmarkModel.synthetic(args.synthetic_weights, engine, default_device())
    ranges = usual_ranges(model.checkpoint.geometry, args.max_frames, args.frames)
    here = model.pipeline(model.open(ranges, partial(print, flush=True)).networks)
    plan = model.plan(iterations=args.iterations, seed=SEED, steps=args.steps, max_frames=args.max_frames)
    warm_up = RunPlan(**{**plan.as_dict(), "steps": 2, "scales": plan.scales[:1]})
    factory = partial(open_here, args.synthetic_weights, engine, ranges)

    def open_pipeline(workers: int) -> Pipeline:
        if not workers:
            return here
        pipeline = RayPipeline(factory, model.tokenizers(), workers=workers)
        pipeline.wait_for_all()
        return pipeline

    drawn: list[Drawn] = []
    first: Pictures = {}
    for workers, stories in dict.fromkeys([(0, 1), (0, args.stories), (1, 1), (args.workers, 1)]):
        started = time.perf_counter()
        with closing(open_pipeline(workers)) as pipeline:
            ready = time.perf_counter() - started
            draw(pipeline, warm_up, args.frames, stories)
            started = time.perf_counter()
            pictures = draw(pipeline, plan, args.frames, stories)
            seconds = time.perf_counter() - started
        first = first or pictures
        psnr = []
        for iteration in range(plan.iterations if stories == 1 else 0):
            places = [(iteration, frame) for frame in range(args.frames)]
            psnr.append(min(psnr_of_each([pictures[at] for at in places], [first[at] for at in places])))
        drawn.append(Drawn(workers, stories, ready, seconds, psnr))
        print(f"{workers} workers, {stories} stories: {seconds:.1f} s", flush=True)
    return WorkersReport(
        environment=describe(default_device(), args.commit),
        model=model.label,
        backend=engine.backend,
        precision=engine.precision,
        frames=args.frames,
        iterations=args.iterations,
        steps=args.steps,
        max_frames=args.max_frames,
        rows=plan.unet_rows(args.frames),
        drawn=drawn,
    )


def as_data(found: WorkersReport) -> dict[str, Any]:
    """The report as JSON data."""
    return {"kind": KIND, "version": 1, **asdict(found)}


def markdown(found: WorkersReport) -> str:
    """The page."""
    one, *_ = found.drawn
    rows = [
        (
            drawn.workers or "this process",
            drawn.stories,
            f"{drawn.ready_seconds:.1f}",
            f"{drawn.seconds:.2f}",
            f"{found.rows / drawn.seconds:.1f}",
            f"{one.seconds / drawn.seconds:.3f}",
            ", ".join(f"{psnr:.1f}" for psnr in drawn.psnr),
        )
        for drawn in found.drawn
    ]
    facts = [f"- {name}: {value}" for name, value in found.environment.items()]
    return "\n".join(
        [
            "# A story on one device and on several",
            "",
            f"{found.model}, {found.backend} {found.precision}: {found.frames} frames, {found.iterations} iterations "
            f"after the text-only one, {found.steps} steps, at most {found.max_frames} frames in a batch.",
            "",
            *facts,
            "",
            *table(
                ("workers", "stories", "s until ready", "s", "rows/s", "times one", "worst PSNR by iteration, dB"),
                rows,
            ),
            "",
        ]
    )
