"""The command `serve`: from its options to a server."""

import argparse
from contextlib import closing
from dataclasses import fields
from pathlib import Path

from storyadapter.cli.commands import OPENING
from storyadapter.cli.devices import only_device
from storyadapter.cli.drawing import open_pipeline, with_scales
from storyadapter.cli.options import model_choice, shape_ranges
from storyadapter.cli.reporting import reporting
from storyadapter.cli.sessions import open_session
from storyadapter.engine.identity import model_weights
from storyadapter.method.errors import Field, InputError, UnavailableError
from storyadapter.method.presets import check_preset
from storyadapter.serve.limits import Limits


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        InputError: it can't be served as typed.
        RunError: the port can't be had, or no device is left.
    """
    limits = Limits(**{setting.name: getattr(args, setting.name) for setting in fields(Limits)})
    for setting in fields(Limits):
        if getattr(limits, setting.name) < 1:
            raise InputError(Field(setting.name), f" is {getattr(limits, setting.name)}", expected="1 or more")
    try:
        from storyadapter.serve.gate import Keys
        from storyadapter.serve.server import check_address
        from storyadapter.serve.server import serve as serve_until_stopped
    except ImportError as error:
        raise UnavailableError(
            f"{error.name} isn't installed", advice="pip install 'storyadapter-trt[serve]'"
        ) from error
    keys = Keys(args.keys)
    check_address(args.host, keys)
    data = Path(args.data)
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{data} can't be made: {error.strerror}") from error
    with reporting(args) as reporter, only_device(args.device):
        reporter.stage("", OPENING)
        session = open_session(args, model_choice(args))
        check_preset(args.preset, session.checkpoint.sampling.embeds_guidance)
        pixels = session.checkpoint.geometry.default_pixels
        ranges = shape_ranges(args, pixels)
        weights = model_weights(session.checkpoint, reporter.bytes_read)
        session = with_scales(args, session, ranges, weights.key, reporter)
        with closing(open_pipeline(args, session, ranges, ranges.max_frames, reporter)) as pipeline:
            address = f"http://{args.host}:{args.port}"
            text = f"{session.model.label}, {session.how}: stories are served at {address}"
            reporter.note("serving", text, address=address)
            serve_until_stopped(
                pipeline,
                data,
                host=args.host,
                port=args.port,
                keys=keys,
                hosts=tuple(args.allow_host),
                limits=limits,
                gpu_price=args.gpu_price,
                defaults={"height": pixels, "width": pixels, "max_frames": args.max_frames, "preset": args.preset},
            )
            reporter.note("served", "stopped; stories that aren't finished go on when the server is started again")
    return 0
