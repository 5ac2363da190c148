"""`storyadapter-trt build`."""

import argparse
import time

from storyadapter.cli.options import shape_ranges
from storyadapter.cli.reporting import duration, print_result, reporter_for
from storyadapter.cli.session import open_session
from storyadapter.contract import check_pixels
from storyadapter.engine.backends import BACKENDS
from storyadapter.engine.opening import build_engine, identify


def build(args: argparse.Namespace) -> int:
    """Build the engine of a model and say where it lies; returns the exit code."""
    for name in ("height", "width"):
        if (pixels := getattr(args, name)) is not None:
            check_pixels(f"--{name}", pixels.minimum)
            check_pixels(f"--{name}", pixels.maximum)
    session = open_session(args)
    ranges = shape_ranges(args, session.checkpoint.geometry.default_pixels)
    if not BACKENDS[session.backend].builds:
        print_result(f"backend {session.backend} needs no build: run uses the checkpoint itself")
        return 0
    reporter = reporter_for(args)
    try:
        identity = identify(session.checkpoint, session.backend, session.precision, reporter.bytes_read)
        reporter.note(
            "build",
            f"build {session.model.label} for {session.backend} {session.precision}: up to {ranges.max_frames} frames "
            f"of {ranges.height}x{ranges.width} at once, stories of up to {ranges.max_references} frames",
        )
        started = time.perf_counter()
        engine = build_engine(
            session.checkpoint,
            identity,
            ranges,
            engine_dir=args.engine_dir,
            on_stage=reporter.stage,
            on_wait=lambda message: reporter.note("wait", message),
        )
    finally:
        reporter.close()
    text = f"engine {engine.folder} ({engine.bytes / 2**20:.0f} MB, {duration(time.perf_counter() - started)})"
    if args.json_log:
        reporter.note("built", text, folder=str(engine.folder), bytes=engine.bytes)
    elif not args.quiet:
        print_result(text)
    return 0
