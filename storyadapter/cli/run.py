"""`storyadapter-trt run`."""

import argparse
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from storyadapter.cli.options import build_command, run_plan
from storyadapter.cli.reporting import Reporter, duration, print_result, reporter_for, scale_in_words
from storyadapter.cli.session import Session, count, open_session
from storyadapter.contract import Range, ShapeRanges, check_pixels
from storyadapter.demo.shipped import STORY
from storyadapter.engine.opening import identify, open_networks
from storyadapter.errors import InputError
from storyadapter.events import FrameFinished, IterationFinished, RunFinished
from storyadapter.pipeline import FinishedIteration, StoryPipeline
from storyadapter.plan import RunPlan, split_evenly
from storyadapter.run_folder import RunFolder, stored_identity
from storyadapter.sampler import build_sampler
from storyadapter.story import Story, check_style

DEFAULT_STYLE = "comic"
INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Draw a story into a folder; returns the exit code."""
    story = _story(args)
    style = check_style(args.style or story.style or DEFAULT_STYLE)
    for name in ("height", "width"):
        if (pixels := getattr(args, name)) is not None:
            check_pixels(f"--{name}", pixels)
    seed = _seed(args)
    run_plan(args, 1024, seed)  # every other setting, before the model's files are opened
    build_sampler(args.scheduler, args.steps, args.karras, args.prediction_type)
    session = open_session(args)
    plan = run_plan(args, session.checkpoint.geometry.default_pixels, seed)
    reporter = reporter_for(args)
    try:
        return _draw(args, story, style, plan, session, reporter)
    finally:
        reporter.close()


def _story(args: argparse.Namespace) -> Story:
    if args.story:
        return Story.from_arguments(args.story)
    if args.prompt:
        return Story.from_prompts(args.prompt)
    if args.base_model:
        raise InputError("no story; type --story FILE, or --prompt TEXT once per frame")
    return Story.from_file(STORY)


def _seed(args: argparse.Namespace) -> int:
    """The seed asked for, that of the run which `--out` already holds, or a fresh one."""
    if args.seed is not None:
        return args.seed
    stored = stored_identity(args.out)
    return int(stored["plan"]["seed"]) if stored else secrets.randbelow(2**32)


def _draw(
    args: argparse.Namespace, story: Story, style: str, plan: RunPlan, session: Session, reporter: Reporter
) -> int:
    frames = len(story.prompts)
    batches = split_evenly(frames, plan.max_frames)
    wanted = ShapeRanges(
        max(len(batch) for batch in batches), frames, Range(plan.height, plan.height), Range(plan.width, plan.width)
    )
    built_for = ShapeRanges(plan.max_frames, frames, wanted.height, wanted.width)
    started = time.perf_counter()
    engine_identity = identify(session.checkpoint, session.backend, session.precision, reporter.bytes_read)
    networks = open_networks(
        session.checkpoint,
        backend=session.backend,
        precision=session.precision,
        ranges=wanted,
        engine_dir=args.engine_dir,
        build_command=build_command(args, session.backend, session.precision, built_for),
        on_stage=reporter.stage,
    )
    pipeline = StoryPipeline(networks, session.checkpoint.load_tokenizers())
    identity = {
        "story": story.to_dict(),
        "style": style,
        "plan": plan.as_dict(),
        "backend": session.backend,
        "precision": session.precision,
        "weights": {f"{w.component}/{w.name}": w.sha256 for w in engine_identity.weights},
        "loras": [{"name": lora.name, "sha256": lora.sha256, "scale": lora.scale} for lora in engine_identity.loras],
    }
    scales = [plan.scale_of(iteration) for iteration in range(plan.iterations)]
    details = {
        "model": session.model.label,
        "split": [len(batch) for batch in batches],
        "final_prompts": list(story.final_prompts(style)),
        "device": str(networks.device),
        "versions": versions(),
    }
    with RunFolder.open(
        args.out, identity, frames=frames, scales=scales, resume=args.resume, keep=args.keep, details=details
    ) as folder:
        for notice in folder.notices:
            reporter.note("warning", notice)
        loading = {"load": time.perf_counter() - started}
        _tell_plan(story, plan, session, pipeline, folder, reporter)
        try:
            _iterate(pipeline, story, style, plan, folder, reporter, loading)
        except KeyboardInterrupt:
            reporter.close()
            done = folder.finished_iterations()
            print(
                f"storyadapter-trt: stopped with {done} of {plan.iterations} iterations finished; "
                "type the same command with --resume to go on",
                file=sys.stderr,
            )
            return INTERRUPTED
    if not args.quiet and not args.json_log:
        reporter.close()
        print_result(f"{Path(args.out) / 'contact-sheet.png'} (seed {plan.seed})")
    return 0


def _tell_plan(
    story: Story,
    plan: RunPlan,
    session: Session,
    pipeline: StoryPipeline,
    folder: RunFolder,
    reporter: Reporter,
) -> None:
    """The line before slow work; the time is that of the rows that are left, from one timed UNet call."""
    frames, first = len(story.prompts), folder.finished_iterations()
    batches = split_evenly(frames, plan.max_frames)
    left = plan.unet_rows(frames) * (plan.iterations - first) // plan.iterations
    seconds = pipeline.seconds_per_row(plan, len(batches[0]), frames) * left if left else 0.0
    memory = pipeline.memory_in_use()
    split = " + ".join(str(len(batch)) for batch in batches)
    reporter.note(
        "plan",
        f"{session.model.label}, {session.backend} {session.precision} on {pipeline.networks.device}: "
        f"{count(frames, 'frame')} of {plan.width}x{plan.height}, {count(plan.iterations, 'iteration')}"
        + (f" ({first} finished)" if first else "")
        + f", {left:,} UNet rows in micro-batches of {split}; {memory / 2**20:,.0f} MB in use; seed {plan.seed}; "
        f"about {duration(seconds)}",
        frames=frames,
        iterations=plan.iterations,
        finished=first,
        unet_rows=left,
        split=[len(batch) for batch in batches],
        memory_bytes=memory,
        seconds=round(seconds, 1),
        seed=plan.seed,
    )


def _iterate(
    pipeline: StoryPipeline,
    story: Story,
    style: str,
    plan: RunPlan,
    folder: RunFolder,
    reporter: Reporter,
    seconds: dict[str, float],
) -> None:
    prompts = story.final_prompts(style)
    done = folder.finished_iterations()
    resume = FinishedIteration(done - 1, folder.load_iteration(done - 1)) if done else None
    saving = 0.0
    for event in pipeline.run(story, plan, style=style, resume=resume):
        started = time.perf_counter()
        match event:
            case FrameFinished(iteration, frame, scale, picture):
                text = {"prompt": prompts[frame], "seed": str(plan.seed), "scale": scale_in_words(scale)}
                folder.save_frame(iteration, frame, picture, text)
            case IterationFinished(iteration, stages):
                folder.finish_iteration(iteration, stages)
            case RunFinished(stages):
                folder.finish({**seconds, **stages, "save": saving}, story.prompts, story.title)
        saving += time.perf_counter() - started
        reporter.event(event)


def versions() -> dict[str, Any]:
    """What `story.json` says of the program that drew it."""
    import platform

    import storyadapter
    from storyadapter.engine.backends import installed_version

    packages = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")
    found = {package: version for package in packages if (version := installed_version(package))}
    return {"storyadapter-trt": storyadapter.__version__, "python": platform.python_version(), **found}
