"""The commands `build` and `run`: every check that needs no PyTorch, then the work."""

import argparse
import secrets
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from storyadapter.cli.options import Session, backend_options, model_choice, open_session, run_plan, shape_ranges
from storyadapter.cli.reporting import Reporter, count, duration, reporter_for
from storyadapter.demo.shipped import STORY
from storyadapter.method import constants
from storyadapter.method.errors import InputError
from storyadapter.method.story import Story, check_style
from storyadapter.model.contract import ShapeRanges
from storyadapter.output.run_record import stored_identity

DEFAULT_STYLE = "comic"
_ANY_SIZE = constants.PIXEL_MULTIPLE  # until the model's own is known


def build(args: argparse.Namespace) -> int:
    """Build the engine of a model and say where it lies; returns the exit code.

    Raises:
        InputError: it can't be built as typed, or the store can't be written.
        EngineBuildError: an exported network doesn't compute what eager computes.
        RunError: no space is left.
    """
    shape_ranges(args, _ANY_SIZE)  # checks what was typed
    session = open_session(args, model_choice(args))
    options = backend_options(args, session.backend)
    ranges = shape_ranges(args, session.checkpoint.geometry.default_pixels)
    with closing(reporter_for(args)) as reporter:
        if session.backend.builds:
            _build(args, session, ranges, options, reporter)
        else:
            text = f"backend {session.backend.name} needs no build: run uses the checkpoint itself"
            reporter.result("built", text, folder=None)
    return 0


def _build(args: argparse.Namespace, session: Session, ranges: ShapeRanges, options: Any, reporter: Reporter) -> None:
    from storyadapter.engine.opening import build_engine
    from storyadapter.engine.store import EngineStore

    started = time.perf_counter()
    session.backend.check(session.numerics, ranges)
    identity = session.backend.identity(session.checkpoint, session.numerics, options, reporter.bytes_read)
    reporter.note(
        "build",
        f"build {session.model.label} for {session.how}: up to "
        f"{count(ranges.max_frames, 'frame')} of {ranges.width}x{ranges.height} at once, stories of up to "
        f"{count(ranges.max_references, 'frame')}",
    )
    new = EngineStore(args.engine_dir).get(identity, ranges) is None
    engine = build_engine(
        session.checkpoint,
        identity,
        ranges,
        options=options,
        engine_dir=args.engine_dir,
        on_stage=reporter.stage,
        on_bytes=reporter.bytes_read,
        on_fraction=reporter.fraction,
        on_wait=lambda message: reporter.note("wait", message),
    )
    how = f"built in {duration(time.perf_counter() - started)}" if new else "was there already"
    text = f"engine {engine.folder} ({engine.bytes / 2**20:,.0f} MiB, {how})"
    reporter.result("built", text, folder=str(engine.folder), bytes=engine.bytes, new=new)


def run(args: argparse.Namespace) -> int:
    """Draw a story into a folder; returns the exit code.

    Raises:
        InputError: it can't be drawn as typed; nothing was written.
        RunError: it had to stop; finished iterations are kept.
    """
    story = _story(args)
    style = check_style(args.style or story.style or DEFAULT_STYLE)
    seed = _seed(args, stored_identity(args.out))
    run_plan(args, _ANY_SIZE, seed)
    session = open_session(args, model_choice(args))
    plan = run_plan(args, session.checkpoint.geometry.default_pixels, seed)
    from storyadapter.cli.drawing import draw

    with closing(reporter_for(args)) as reporter:
        draw(args, story, style, plan, session, reporter)
    return 0


def _story(args: argparse.Namespace) -> Story:
    if args.story:
        return Story.from_arguments(args.story)
    if args.prompt:
        return Story.from_prompts(args.prompt)
    if args.base_model:
        raise InputError("no story; type --story FILE, or --prompt TEXT with a text per frame")
    return Story.from_file(STORY)


def _seed(args: argparse.Namespace, stored: Mapping[str, Any] | None) -> int:
    """The seed asked for, that of the run which `--out` already holds, or a fresh one."""
    if args.seed is not None:
        return args.seed
    seed = stored.get("plan", {}).get("seed") if stored else None
    return seed if isinstance(seed, int) else secrets.randbelow(2**32)
