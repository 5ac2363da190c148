"""`storyadapter-trt bench quality`: does the method keep its character, measured on pictures of held-out stories."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.bench.options import add_engine_options, check_least
from storyadapter.demo.shipped import MODEL
from storyadapter.engine.backends import AUTO, BACKENDS
from storyadapter.method import constants
from storyadapter.method.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from storyadapter.demo.held_out import HeldOutStory

HELP = "does the method keep its character, on held-out stories of the demo model"
DESCRIPTION = """\
Draws held-out stories with the demo model and reads the characters' traits off the pictures: on how many do the frames
of a story agree, and do they still show what was prompted? Exit code 1 if consistency hasn't clearly risen from the
first iteration to the last, or fidelity has clearly fallen. MODEL.md of the demo model has a command that took 28
minutes on 2 CPU cores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench quality`. Imports nothing heavy."""
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="DIR", help="folder of a demo model (default: the shipped one)"
    )
    parser.add_argument(
        "--stories", type=int, default=24, metavar="N", help="held-out stories, 2 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--frames", type=int, default=8, metavar="N", help="frames of each story, 2 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="drawings of each story (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=constants.ITERATIONS,
        metavar="K",
        help="after the first (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=constants.STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=constants.GUIDANCE, help="(default: %(default)s)")
    parser.add_argument(
        "--sampler",
        choices=("pipeline", "batched"),
        default="pipeline",
        help="pipeline: what run uses, story by story; batched: a plain second implementation of the method in PyTorch "
        "that draws all stories at once (default: %(default)s)",
    )
    text = "of the pipeline; its engine is built first where the store has none"
    add_engine_options(parser, backend=text, default="eager", precision="of the pipeline")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write quality.json and a sheet per story here")


def run(args: argparse.Namespace) -> int:
    """Draw the stories, judge them, print the table. Returns 0 if the method's claim holds on them, else 1.

    Raises:
        InputError: too few stories, frames, seeds or iterations; no demo model there; options that don't fit together.
    """
    check_least(args, stories=2, frames=2, seeds=1, iterations=1)
    if not (args.model / "model_index.json").is_file():
        raise InputError(
            f"--model {args.model}: no model_index.json there; expected the folder of a trained demo model"
        )
    other = args.backend == AUTO or BACKENDS[args.backend].builds or args.precision not in (AUTO, "fp32")
    if args.sampler == "batched" and other:
        raise InputError(
            "--sampler batched is plain PyTorch in fp32; expected no other --backend or --precision with it"
        )
    if args.sampler == "batched" and not find_spec("storyadapter.demo.training"):
        raise InputError("--sampler batched belongs to the training of demo models, which only a checkout has")
    import numpy as np

    from storyadapter.bench.quality_report import measure
    from storyadapter.demo.held_out import FRAMES_AT_MOST, held_out_stories

    if args.frames > FRAMES_AT_MOST:
        raise InputError(f"--frames is {args.frames}; expected {FRAMES_AT_MOST} or fewer: so many scenes there are")
    stories = held_out_stories(args.stories, args.frames)
    drawn, control = (_draw_batched if args.sampler == "batched" else _draw_by_pipeline)(stories, args)
    truth = np.stack([story.truth for story in stories])
    quality = measure(read_labels(drawn), read_labels(control), truth)
    print(quality.table())
    print(f"consistency of independent characters: {quality.chance:.3f}")
    print(f"agreement with the iteration before: {quality.own}; with another story's references: {quality.control}")
    if args.out:
        from PIL import Image

        args.out.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
        result = {"settings": settings, **quality.as_dict()}
        (args.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for n in range(len(stories)):  # a sheet of the first drawing of each: a row per iteration
            rows, columns, _, height, width = drawn[:, n, 0].shape
            sheet = drawn[:, n, 0].permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
            Image.fromarray(sheet.contiguous().numpy()).save(args.out / f"story-{n:02d}.png")
    risen, kept = quality.holds()
    print(f"consistency risen: {'yes' if risen else 'no'}; fidelity kept: {'yes' if kept else 'no'}")
    return 0 if risen and kept else 1


def seed_of(story: int, repeat: int) -> int:
    """The seed of one drawing of one story."""
    return 1000 * (repeat + 1) + story


def read_labels(pictures: Tensor) -> np.ndarray:
    """What the judge reads off pictures uint8 [..., 3, H, W]: int64 [..., traits]."""
    import torch

    from storyadapter.demo.judge import load_judge

    judge = load_judge(device="cuda" if torch.cuda.is_available() else "cpu")
    lead = pictures.shape[:-3]
    return judge.read(pictures.flatten(0, len(lead) - 1)).unflatten(0, lead).numpy()


def _draw_by_pipeline(stories: list[HeldOutStory], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [iterations, stories, seeds, frames, 3, H, W], and of the control [stories, seeds, …]."""
    import numpy as np
    import torch

    from storyadapter import Story, StoryPipeline
    from storyadapter.bench.model import BenchmarkModel, usual_ranges
    from storyadapter.bench.options import EngineChoice
    from storyadapter.checkpoint.paths import CheckpointPaths
    from storyadapter.cli.options import ModelChoice
    from storyadapter.engine.backend import default_device
    from storyadapter.method.events import FrameFinished
    from storyadapter.method.plan import FRAMES_UNMEASURED, RunPlan
    from storyadapter.runtime.pipeline import FinishedIteration

    paths = CheckpointPaths(args.model, args.model / "image_encoder", args.model / "ip-adapter.safetensors")
    model = BenchmarkModel.from_files(ModelChoice(paths, str(args.model)), EngineChoice.typed(args), default_device())
    geometry = model.checkpoint.geometry
    side = geometry.default_pixels
    # for frames of one micro-batch
    ranges = usual_ranges(geometry, max(args.frames, FRAMES_UNMEASURED), args.frames)
    networks = model.open(ranges, lambda line: print(line, flush=True)).networks
    pipeline = StoryPipeline(networks, model.checkpoint.load_tokenizers())
    scales = constants.reference_scales(args.iterations)

    def draw(number: int, repeat: int, resume: FinishedIteration | None = None) -> list[list[Image.Image]]:
        """The frames of each iteration that is left."""
        plan = RunPlan(
            height=side,
            width=side,
            seed=seed_of(number, repeat),
            scales=scales,
            steps=args.steps,
            guidance=args.guidance,
            max_frames=args.frames,
        )
        story = Story(tuple(stories[number].prompts), style="none")
        events = pipeline.run(story, plan, resume=resume)
        frames = [event.picture for event in events if isinstance(event, FrameFinished)]
        return [frames[start : start + args.frames] for start in range(0, len(frames), args.frames)]

    def tensor(iterations: list[list[Image.Image]]) -> Tensor:
        pixels = np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in iterations])
        return torch.from_numpy(pixels).movedim(-1, -3)

    shape = (len(stories), args.seeds)
    drawn = {}
    for n, k in np.ndindex(shape):
        drawn[n, k] = draw(n, k)
        print(f"story {n + 1} of {len(stories)}, seed {k + 1} of {args.seeds} drawn", flush=True)
    before = len(scales) - 1
    control = [
        tensor(draw(n, k, FinishedIteration(before, drawn[(n + 1) % len(stories), k][before]))) for n, k in drawn
    ]
    pictures = torch.stack([tensor(iterations) for iterations in drawn.values()])
    return pictures.unflatten(0, shape).movedim(2, 0), torch.cat(control).unflatten(0, shape)


def _draw_batched(stories: list[HeldOutStory], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The same by the plain second implementation of the method."""
    import torch

    from storyadapter.demo.training.batched import BatchedMethod

    drawer = BatchedMethod(args.model, "cuda" if torch.cuda.is_available() else "cpu", args.steps, args.guidance)
    prompts = [[story.prompts] * args.seeds for story in stories]
    seeds = [[seed_of(n, k) for k in range(args.seeds)] for n in range(len(stories))]
    return drawer.draw_stories(prompts, seeds, constants.reference_scales(args.iterations))
