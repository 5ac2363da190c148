"""`storyadapter-trt build`."""

import argparse
import time
from typing import Any

from storyadapter.cli.options import backend_options, model_choice, shape_ranges
from storyadapter.cli.reporting import Reporter, count, duration, reporter_for
from storyadapter.cli.session import Session, open_session
from storyadapter.method import constants
from storyadapter.model.contract import ShapeRanges


def build(args: argparse.Namespace) -> int:
    """Build the engine of a model and say where it lies; returns the exit code.

    Raises:
        InputError: it can't be built as typed, or the store can't be written.
        EngineBuildError: an exported network doesn't compute what eager computes.
        RunError: no space is left.
    """
    shape_ranges(args, constants.PIXEL_MULTIPLE)  # checks what was typed; the model's own size isn't known yet
    session = open_session(args, model_choice(args))
    options = backend_options(args, session.backend)
    ranges = shape_ranges(args, session.checkpoint.geometry.default_pixels)
    reporter = reporter_for(args)
    try:
        if session.backend.builds:
            _build(args, session, ranges, options, reporter)
        else:
            text = f"backend {session.backend.name} needs no build: run uses the checkpoint itself"
            reporter.result("built", text, folder=None)
    finally:
        reporter.close()
    return 0


def _build(
    args: argparse.Namespace,
    session: Session,
    ranges: ShapeRanges,
    options: Any,
    reporter: Reporter,
) -> None:
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
