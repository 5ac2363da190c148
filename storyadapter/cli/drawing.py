"""The slow part of `storyadapter-trt run`: networks, plan line, iterations, files."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from storyadapter import api
from storyadapter.cli.machine import versions
from storyadapter.cli.options import build_command, option
from storyadapter.cli.recorded import recorded_files
from storyadapter.cli.reporting import Reporter, count, duration
from storyadapter.cli.sessions import Session, calibrated_by
from storyadapter.cli.start_clock import StartClock
from storyadapter.engine.backend import ReportStage
from storyadapter.engine.calibration import find_scales
from storyadapter.engine.identity import ModelWeights, model_weights
from storyadapter.method.constants import CHUNK_TOKENS
from storyadapter.method.control_pictures import control_identity, control_paths, read_controls
from storyadapter.method.errors import EngineMismatchError, Field, RunError, spelled
from storyadapter.method.events import FrameFinished, RunFinished, RunStarted, StepFinished
from storyadapter.method.memory_errors import is_out_of_memory
from storyadapter.method.plan import FRAMES_UNMEASURED, RunPlan, split_evenly
from storyadapter.method.sampler import sampler_of
from storyadapter.method.sampling_notices import sampling_notices
from storyadapter.method.story import FinalFrame, Story
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.output.animation import check_form
from storyadapter.output.edits import Edit
from storyadapter.output.frame_files import frame_text
from storyadapter.output.lettering import Lettering
from storyadapter.output.run_folder import RunFolder
from storyadapter.output.run_record import json_values, refuse_another
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.given_pictures import FramePictures, picture_keys, pictures_of_frames
from storyadapter.runtime.memory import MemoryNeeds
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.runtime.story_jobs import in_chunks, most_chunks

_SCALES = {"denoiser": "scales", "vae_decoder": "vae_scales"}  # under which names records have their keys


def draw(
    args: argparse.Namespace,
    story: Story,
    style: str | None,
    plan: RunPlan,
    session: Session,
    reporter: Reporter,
    clock: StartClock,
    *,
    edit: Edit | None = None,
    edited: bool = False,
) -> None:
    """Draw a story whose settings are checked; `clock` runs until the first step.

    Args:
        edit: of a finished run, which is begun.
        edited: whether an edit may be gone on with.

    Raises:
        InputError: the sampler, the engine store or the output folder refuses; nothing was written.
        RunError: no space or memory left, or a frame that isn't finite.
        KeyboardInterrupt: with a note on what is finished, where the drawing had begun.
    """
    started = time.perf_counter()
    for notice in (*session.checkpoint.notices, *sampling_notices(plan, session.checkpoint.sampling)):
        reporter.note("warning", spelled(notice, option))
    plan = plan.for_model(session.checkpoint.sampling)
    for iteration in range(plan.iterations):
        sampler_of(plan.sampler_in(iteration))
    controls = read_controls(story, plan, lambda notice: reporter.note("warning", spelled(notice, option)))
    lettering = Lettering(args.font)
    check_form(args.animation)
    frames = len(story.frames)
    final = in_chunks(story.final_frames(plan, style), plan, Tokenizers(*session.checkpoint.load_tokenizers()))
    pictures = pictures_of_frames(story)
    attended = plan.references(frames, max(map(len, pictures)))
    height, width = (Range(pixels, pixels) for pixels in plan.size)
    ranges = ShapeRanges(plan.max_frames or FRAMES_UNMEASURED, attended, height, width, most_chunks(final))
    scales = [plan.scale_of(iteration) for iteration in range(plan.iterations)]
    weights = model_weights(session.checkpoint, reporter.bytes_read)
    session = with_scales(args, session, ranges, weights.key, reporter)
    identity = _identity(story, style, plan, session, weights, pictures) | control_identity(controls)
    clock.mark("weights' hashes")
    if edit:
        new = edit.identity(identity["references"], identity.get("control"))
        refuse_another(edit.run.folder, new, json_values(identity))
    else:
        RunFolder.check(args.out, identity, frames=frames, scales=scales, resume=args.resume, edited=edited)
    with (
        _told_when_out_of_memory(plan),
        _told_when_texts_are_too_long(final, may_cut=not edited),
        closing(_open_pipeline(args, ranges, frames, session, reporter, clock)) as pipeline,
    ):
        batching = pipeline.batching(plan, frames, len(story.negative_prompts(plan)), most_chunks(final))
        clock.mark("measuring memory")
        loading = time.perf_counter() - started
        details = {
            "model": session.model.label,
            "files": recorded_files(session.model.paths),
            "backend": session.backend.name,
            "preset": args.preset,
            "split": [len(batch) for batch in split_evenly(frames, batching.max_frames, pipeline.worker_count)],
            "max_frames": batching.max_frames,
            "text_kept": batching.keep_text,
            "final_prompts": [frame.prompt for frame in final],
            **({"control_pictures": control_paths(story)} if any(controls) else {}),
            "device": str(pipeline.networks.device),
            "workers": pipeline.worker_count,
            "versions": versions(),
            "weights_hashed": _how_hashed(session, weights),
        }
        if edit:
            edit.begin(identity, None if args.in_place else args.out)
            details["edit"] = {"of": str(edit.run.folder), "frames": edit.frames, "follows": edit.follows}
        with RunFolder.open(
            args.out,
            identity,
            frames=frames,
            scales=scales,
            resume=args.resume or edit is not None,
            keep=args.keep,
            details=details,
            text=frame_text(final),
            edited=edited,
        ) as folder:
            start: Mapping[str, float] = {}
            try:
                for notice in folder.notices:
                    reporter.note("warning", spelled(notice, option))
                rows = 0
                before = folder.earlier_details[-1].get("backend") if folder.earlier_details else None
                if before not in (None, session.backend.name):
                    text = f"begun with backend {before}, going on with {session.backend.name}"
                    reporter.note("warning", f"{text}: frames differ, by rounding, from those of a run with one")
                with closing(pipeline.run(story, plan, style=style, store=folder, controls=controls)) as events:
                    for event in events:
                        if isinstance(event, RunFinished):
                            seconds = {"load": loading, **event.seconds, "save": folder.seconds}
                            told = folder.finish(
                                seconds,
                                story.prompts,
                                story.title,
                                form=args.animation,
                                lettering=lettering,
                                start=start,
                            )
                            for notice in told:
                                reporter.note("warning", spelled(notice, option))
                        if isinstance(event, FrameFinished):
                            reporter.event(event, path=str(folder.frame_path(event.iteration, event.frame)))
                        else:
                            reporter.event(event)
                        if isinstance(event, RunStarted):
                            rows = event.rows
                            _tell_plan(plan, attended, session, pipeline, event, batching.needs, reporter)
                            clock.mark("first batch")
                        elif isinstance(event, StepFinished) and not start:
                            clock.mark("first step")
                            start = clock.seconds
            except KeyboardInterrupt as stop:
                done = folder.finished_iterations()
                stop.add_note(
                    f"{done} of {count(plan.iterations, 'iteration')} finished; "
                    + (
                        f"to go on type edit {args.out} --resume"
                        if edited
                        else "type the same command with --resume to go on"
                    )
                )
                raise
    sheet = Path(args.out) / "contact-sheet.png"
    text = f"{sheet} ({count(frames, 'frame')}, {count(plan.iterations, 'iteration')}, "
    text += f"seed {plan.seed}, {duration(reporter.seconds)})"
    reporter.result(
        "drawn",
        text,
        out=str(args.out),
        contact_sheet=str(sheet),
        seed=plan.seed,
        seconds=reporter.seconds,
        cost={"seconds": reporter.seconds, "unet_rows": rows, "device": str(pipeline.networks.device)},
    )
    reporter.hint(
        f"pictures: {sheet.parent}/frames, of the last round; all in a row: {sheet.parent}/story.{args.animation}"
    )
    if session.model.paths.is_demo:
        reporter.hint('next: your own story, --out mine --prompt "a blue cat is reading a book" …, or --story FILE')
    else:
        reporter.hint(f'next: to change a picture, storyadapter-trt edit {args.out} --frame 0 --prompt "…"')


def _how_hashed(session: Session, weights: ModelWeights) -> str:
    """Whether the hashes that are recorded are those of bytes that this process read."""
    if not session.backend.holds_weights:
        return "as they were loaded"
    return "earlier; files are known by size and times" if weights.remembered else "before the engine was opened"


def _identity(
    story: Story, style: str | None, plan: RunPlan, session: Session, model: ModelWeights, pictures: FramePictures
) -> dict[str, Any]:
    """Everything that decides the pictures. The split into micro-batches doesn't: it may change in a resumed run."""
    return {
        "story": story.without_control().to_dict(),
        "style": style,
        "plan": {name: value for name, value in plan.as_dict().items() if name != "max_frames"},
        "precision": session.numerics.name,
        "vae_precision": session.numerics.named("vae_decoder"),
        **{_SCALES[network]: own.scales for network, own in session.numerics.quantizations.items()},
        "weights": {f"{weight.component}/{weight.name}": weight.blake3 for weight in model.files},
        "loras": [{"name": lora.name, "blake3": lora.blake3, "scale": lora.scale} for lora in model.loras],
        "model": model.key,
        "references": picture_keys(pictures),
    }


def with_scales(
    args: argparse.Namespace, session: Session, ranges: ShapeRanges, model: str, reporter: Reporter
) -> Session:
    """The session with its model's scales, if it is quantized; `model`: the key of its weights. A build command that is
    told after this calibrates by the same story.

    Raises:
        EngineMismatchError: the store has none.
    """
    if not (quantizations := session.numerics.quantizations):
        return session
    if (scales := find_scales(args.engine_dir, model, quantizations)) is not None:
        reporter.note("calibrated", calibrated_by(scales))
        args.calibration_story = next((own.story.path for own in scales.values() if own.story), None)
        return session.quantized(scales)
    command = build_command(args, session.backend.name, session.numerics, ranges)
    raise EngineMismatchError(f"no scales of {session.model.label} in the engine store; build it: {command}")


def _open_pipeline(
    args: argparse.Namespace, ranges: ShapeRanges, frames: int, session: Session, reporter: Reporter, clock: StartClock
) -> Pipeline:
    """The networks for the plan's batches; the build command that is told asks for `--max-frames`."""
    stage = "opening"

    def on_stage(network: str, what: str) -> None:
        nonlocal stage
        clock.mark(stage)
        stage = what
        reporter.stage(network, what)

    pipeline = open_pipeline(args, session, ranges, len(split_evenly(frames, ranges.max_frames)[0]), reporter, on_stage)
    clock.mark(stage)
    return pipeline


def open_pipeline(
    args: argparse.Namespace,
    session: Session,
    ranges: ShapeRanges,
    together: int,
    reporter: Reporter,
    on_stage: ReportStage | None = None,
) -> Pipeline:
    """The networks, on this device or on workers.

    Args:
        ranges: of the engine whose build command is told where there is none.
        together: frames that are to be drawn at once; fewer where the engine takes fewer and nobody asked for as many.
        on_stage: told of the networks that are opened on this device, instead of the reporter.
    """

    def opened(together: int) -> Pipeline:
        how: dict[str, Any] = {
            "backend": session.backend.name,
            "numerics": session.numerics,
            "ranges": replace(ranges, max_frames=together),
            "engine_dir": args.engine_dir,
            "build_command": build_command(args, session.backend.name, session.numerics, ranges),
        }
        if args.workers or args.ray:
            reporter.note("workers", "starting workers")
            return api.open_workers(
                session.checkpoint,
                workers=args.workers,
                address=args.ray,
                on_wait=lambda message: reporter.note("wait", message),
                **how,
            )
        return api.open_checkpoint(session.checkpoint, on_stage=on_stage or reporter.stage, **how)

    try:
        return opened(together)
    except EngineMismatchError:
        if args.max_frames is not None or together == 1:
            raise
    return opened(1)  # how many it takes is the engine's own; what is told now is what else differs


@contextmanager
def _told_when_texts_are_too_long(frames: Sequence[FinalFrame], *, may_cut: bool) -> Iterator[None]:
    try:
        yield
    except EngineMismatchError as error:
        if error.field != "max_prompt_chunks":
            raise
        longest = max(range(len(frames)), key=lambda number: frames[number].chunks)
        fill = f"the texts of frame {longest} fill {frames[longest].chunks} chunks of {CHUNK_TOKENS} tokens"
        cut = ("type ", Field("prompt_chunks"), " 1 to cut texts at the end of the first one, or ") if may_cut else ""
        raise EngineMismatchError(f"{fill}; ", *error.args, advice=(cut, error.advice), field=error.field) from error


@contextmanager
def _told_when_out_of_memory(plan: RunPlan) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        height, width = plan.size
        if not is_out_of_memory(error):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(
                f"out of memory on the GPU with one frame of {width}x{height} at once; end other programs "
                "that use it, or type a smaller --height and --width, with another --out"
            ) from error
        max_frames = plan.max_frames or FRAMES_UNMEASURED
        raise RunError(
            f"out of memory with --max-frames {max_frames} and frames of {width}x{height}; "
            "type a smaller --max-frames, and --resume to keep what is finished"
        ) from error


def _tell_plan(
    plan: RunPlan,
    attended: int,
    session: Session,
    pipeline: Pipeline,
    started: RunStarted,
    needs: MemoryNeeds | None,
    reporter: Reporter,
) -> None:
    """The line before slow work; the time is that of the rows that are left, from one timed UNet call."""
    frames, first = started.frames, started.first_iteration
    left = started.rows
    seconds = 0.0
    if left and needs is not None:  # a GPU's memory was measured by calls, and one of them was timed
        seconds = needs.seconds_per_row * left
    elif left:
        reporter.stage("", "timing one step")
        seconds = pipeline.seconds_per_row(plan, len(started.batches[0]), attended) * left
    memory = pipeline.memory_in_use()
    split = " + ".join(str(len(batch)) for batch in started.batches)
    text = "once" if started.text_kept else "again for each of them, to save memory"
    finished = f" ({first} finished)" if first else ""
    whole = (plan.iterations - first) * frames
    rest = f", {started.left} of {count(whole, 'picture')} left" if started.left < whole else ""
    height, width = plan.size
    drawn = sum(map(len, started.batches))
    of = f"{drawn} of " if drawn < frames else ""
    workers = f" of {count(pipeline.worker_count, 'worker')}" if pipeline.worker_count > 1 else ""
    reporter.note(
        "plan",
        f"{session.model.label}: {of}{count(frames, 'frame')} of {width}x{height}, "
        f"{count(plan.iterations, 'round')}{finished}{rest}, about {duration(seconds)} (seed {plan.seed})",
        detail=f"  {session.how} on {pipeline.networks.device}{workers}: {left:,} UNet rows in micro-batches of "
        f"{split}; text projected {text}; {memory / 2**20:,.0f} MiB in use",
        frames=frames,
        iterations=plan.iterations,
        finished=first,
        unet_rows=left,
        split=[len(batch) for batch in started.batches],
        text_kept=started.text_kept,
        needs=None if needs is None else asdict(needs),
        memory_bytes=memory,
        seconds=round(seconds, 1),
        seed=plan.seed,
    )
