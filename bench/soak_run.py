"""The stories of a soak test, what is noted of each, and the verdict.

Every third story is the first one again: its pictures must be those of the first time, and as the same work ended last,
the memory in use after it can be compared with that after it before.
"""

import argparse
import gc
import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

import psutil
import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.kills import KilledRun, kill_and_resume, kill_workers
from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import opening, table
from storyadapter.bench.throughput.inputs import prompts
from storyadapter.bench.timing import measure_run
from storyadapter.cli.options import MAX_REFERENCES, given_checkpoint_options
from storyadapter.method import constants
from storyadapter.method.events import frames_by_iteration
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.runtime.pipeline import StoryPipeline

REPEATED_EVERY: Final = 3
# What memory after the repeated story may differ by, in bytes and as a share: the resident memory of a process wanders
# as its allocator keeps pages; a GPU's memory is taken in segments, each kept as long as anything in it is in use.
TOLERANCE: Final = {"cpu": (48 * 2**20, 0.03), "cuda": (64 * 2**20, 0.01)}


@dataclass(frozen=True)
class SoakStory:
    """One story: its frames, its size in pixels, its seed and its number of iterations after the first."""

    frames: int
    height: int
    width: int
    seed: int
    iterations: int


@dataclass(frozen=True)
class StoryRecord:
    """What was noted of one story."""

    story: SoakStory  # that was drawn
    repeated: bool  # whether it is the first story, or that again
    seconds: float  # it took
    digest: str  # SHA-256 of all its pictures
    memory: int  # bytes in use after it, see `memory_kept`


@dataclass(frozen=True)
class SoakReport:
    """A whole soak test; `problems` is empty where it passed."""

    environment: dict[str, str]
    model: str
    backend: str
    precision: str
    device: str
    stories: Sequence[StoryRecord]
    growth: int
    allowed: int
    problems: Sequence[str]
    killed: KilledRun | None = None
    workers_killed: KilledRun | None = None


def stories(seed: int, sizes: Sequence[int], max_references: int) -> Iterator[SoakStory]:
    """Endlessly: random stories, and after every two of them the first one again."""
    random = Random(seed)

    def fresh() -> SoakStory:
        frames, height, width = random.randint(1, max_references), random.choice(sizes), random.choice(sizes)
        return SoakStory(frames, height, width, random.randrange(2**32), random.randint(0, 2))

    first = fresh()
    # all that a story can do, so that it leaves behind what any of them leaves
    first = SoakStory(max_references, sizes[-1], sizes[-1], first.seed, 1)
    for index in count():
        yield first if index % REPEATED_EVERY == 0 else fresh()


def growth_of(memory: Sequence[int]) -> int:
    """By how many bytes the memory after the repeated story has grown: the least of the last third over that of the
    middle third; in the first third, caches fill. 0 for fewer than three."""
    third = len(memory) // 3
    if third == 0:
        return 0
    middle, last = memory[third : len(memory) - third], memory[-third:]
    return min(last) - min(middle)


def problems_of(drawn: Sequence[StoryRecord], growth: int, allowed: int) -> list[str]:
    """What is wrong, in words."""
    found = []
    repeated = [item for item in drawn if item.repeated]
    different = [number for number, item in enumerate(repeated) if item.digest != repeated[0].digest]
    if different:
        found.append(f"the repeated story gave other pictures in {len(different)} of {len(repeated) - 1} repeats")
    if len(repeated) < 3:
        found.append(f"only {len(repeated)} of the repeated story: too few to see memory grow; expected 3 or more")
    if growth > allowed:
        found.append(f"memory grew by {growth / 2**20:.0f} MiB; allowed are {allowed / 2**20:.0f} MiB")
    return found


def picture_sizes(default: int) -> list[int]:
    """Heights and widths to choose from, ascending, for a model of this default size."""
    if default < 128:
        return [default, default + constants.PIXEL_MULTIPLE]
    step = constants.PIXEL_MULTIPLE
    return sorted({max(step, int(default * share) // step * step) for share in (0.5, 0.75, 1)})


def soak(args: argparse.Namespace, limit: int | None) -> SoakReport:
    """Draw up to `limit` stories, or until `args.minutes` are over; see `soak.run`."""
    name, engine = args.synthetic_weights, EngineChoice.typed(args)
    # random weights in the numerics of bench throughput: one engine serves both
    model = BenchmarkModel.typed(args, engine.with_fast_vae() if name else engine, name)
    sizes = args.sizes or picture_sizes(model.checkpoint.geometry.default_pixels)
    pixels = Range(sizes[0], sizes[-1])
    # as many references as `build` and the other benchmarks expect, so that one engine serves them all
    ranges = ShapeRanges(args.max_frames, max(MAX_REFERENCES, args.max_references), pixels, pixels)
    networks = model.open(ranges, lambda line: print(line, flush=True)).networks
    device = networks.device  # onnxruntime runs on the CPU beside a GPU, too
    pipeline = model.pipeline(networks)
    drawn: list[StoryRecord] = []
    started = time.monotonic()
    for number, story in enumerate(islice(stories(args.seed, sizes, args.max_references), limit)):
        settings = {name: value for name, value in asdict(story).items() if name != "frames"}
        plan = model.plan(steps=args.steps, max_frames=args.max_frames, **settings)
        digest, seconds = measure_run(lambda: _draw(pipeline, plan, story.frames), device)  # noqa: B023 (called here)
        drawn.append(StoryRecord(story, number % REPEATED_EVERY == 0, seconds, digest, memory_kept(device)))
        size, again = f"{story.width}x{story.height}", " (the repeated story)" if drawn[-1].repeated else ""
        told = f"{number}: {story.frames} frames of {size}, {1 + story.iterations} iterations: {seconds:.1f} s"
        print(f"{told}, {drawn[-1].memory / 2**20:.0f} MiB in use{again}", flush=True)
        if args.minutes is not None and time.monotonic() - started > args.minutes * 60:
            break
    memory = [item.memory for item in drawn if item.repeated]
    floor, share = TOLERANCE[device.type]
    growth, allowed = growth_of(memory), max(floor, int(share * memory[0]))
    facts = (describe(device, args.commit), model.label, engine.backend, engine.precision, str(device))
    return SoakReport(*facts, drawn, growth, allowed, problems_of(drawn, growth, allowed))


def with_kills(found: SoakReport, args: argparse.Namespace, kills: int) -> SoakReport:
    """The report with that of runs that were killed so often, or whose workers were, of four batches an iteration, on
    the same engine."""
    size = found.stories[0].story.height
    words = ["run", "--prompt", *prompts(4 * args.max_frames), "--style", "none", "--iterations", "5"]
    words += ["--height", str(size), "--width", str(size), "--backend", found.backend, "--precision", found.precision]
    words += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("seed", "steps", "max_frames")]
    words += [f"--engine-dir={args.engine_dir}"] if args.engine_dir else []
    words += [word for option, values in given_checkpoint_options(args).items() for v in values for word in (option, v)]
    words += [f"--workers={args.workers}"] if args.workers else []
    runs: list[KilledRun | None] = []
    for kill, times in ((kill_and_resume, kills), (kill_workers, args.worker_kills)):
        with TemporaryDirectory() as folder:
            how = {"kills": times, "max_frames": args.max_frames, "seed": args.seed}
            runs.append(kill(words, Path(folder), **how) if times else None)
    problems = [*found.problems, *(problem for run in runs if run for problem in run.problems)]
    return replace(found, killed=runs[0], workers_killed=runs[1], problems=problems)


def _draw(pipeline: StoryPipeline, plan: RunPlan, frames: int) -> str:
    """SHA-256 of all pictures of a story."""
    digest = hashlib.sha256()
    for pictures in frames_by_iteration(pipeline.run(Story(tuple(prompts(frames)), style="none"), plan)):
        for picture in pictures:
            digest.update(picture.tobytes())
    return digest.hexdigest()


def memory_kept(device: torch.device) -> int:
    """Bytes after what Python can collect was collected: resident on a CPU; of a GPU what PyTorch keeps of its memory
    when it has given back all that it can: tensors, graphs with their scratch memory, and the gaps between them."""
    gc.collect()
    if device.type != "cuda":
        return psutil.Process().memory_info().rss
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def markdown(found: SoakReport) -> str:
    """The page."""
    repeated = [item for item in found.stories if item.repeated]
    frames = sum(item.story.frames * (1 + item.story.iterations) for item in found.stories)
    kind = "kept of the GPU's, graphs included" if found.device.startswith("cuda") else "resident"
    memory = [item.memory for item in repeated]
    first, median, last = (f"{count / 2**20:.0f} MiB" for count in (memory[0], statistics.median(memory), memory[-1]))
    facts = found.environment | {
        "stories": f"{len(found.stories)}, {frames} frames drawn",
        "the repeated story": f"{len(repeated)} times, different pictures: {len({i.digest for i in repeated}) - 1}",
        f"memory after it ({kind})": f"first {first}, median {median}, last {last}",
        "growth, last third over middle": f"{found.growth / 2**20:.1f} MiB; allowed {found.allowed / 2**20:.0f} MiB",
    }
    for run, what in ((found.killed, "kills"), (found.workers_killed, "kills of workers")):
        if run:
            again = f"{run.redrawn} of {run.frames}; allowed {run.allowed}; pictures that differ: {len(run.different)}"
            facts[f"drawn again after {run.killed} {what}"] = again
    facts["verdict"] = "; ".join(found.problems) or "passed"
    rows = []
    for number, item in enumerate(found.stories):
        story, name = item.story, f"{number} (repeated)" if item.repeated else str(number)
        size, memory_after = f"{story.width}x{story.height}", f"{item.memory / 2**20:.0f}"
        rows.append([name, story.frames, size, 1 + story.iterations, f"{item.seconds:.2f}", memory_after])
    header = ["story", "frames", "size", "iterations", "s", "MiB in use after it"]
    lines = [*opening(f"Soak: {found.model}, {found.backend}, {found.precision}", facts), *table(header, rows)]
    return "\n".join(lines) + "\n"
