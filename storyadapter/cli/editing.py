"""The command `edit`: some frames of a finished run again, with the model and the settings of the run."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from storyadapter.cli.commands import OPENING
from storyadapter.cli.devices import only_device
from storyadapter.cli.recorded import recorded_model
from storyadapter.cli.reporting import reporting
from storyadapter.cli.sessions import open_session
from storyadapter.cli.start_clock import StartClock
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.method.errors import InputError


def edit(args: argparse.Namespace) -> int:
    """Draw frames of a finished run again; returns the exit code.

    Raises:
        InputError: it can't be done as typed; nothing was written.
        RunError: it had to stop; what is finished is kept.
    """
    clock = StartClock()
    if args.resume and (args.changes or args.all_iterations):
        raise InputError("--resume goes on with an edit as it was begun; expected nothing but OUT with it")
    if not args.resume and not args.changes:
        raise InputError(f"nothing to change in {args.folder}; expected --frame N and what is new of it")
    with reporting(args) as reporter, only_device(args.device):
        from storyadapter.output.edits import Edit, StoredRun

        for values in args.changes.values():
            if given := values.get("control"):
                paths = [None if path == "none" else path for path in given]
                values["control"] = paths if any(paths) else None
        changed = None if args.resume else Edit.of(args.folder, args.changes, follows=args.all_iterations)
        run = StoredRun.read(args.folder) if changed is None else changed.run
        if args.resume and (run.record.finished or not run.record.edits):
            raise InputError(
                f"{args.folder} holds no edit that was stopped; expected the folder of one, or run --resume for a run"
            )
        if args.out is None:
            here = args.in_place or args.resume
            args.out = args.folder if here else args.folder.with_name(f"{args.folder.name}-edited")
        if changed is not None:
            changed.check(None if args.in_place else args.out)
        _take_over(args, run.record.identity, run.record.sessions[-1].details if run.record.sessions else {})
        args.keep = run.keep
        model = recorded_model(args, run.record.sessions[-1].details if run.record.sessions else {})
        reporter.stage("", OPENING)
        if not (args.workers or args.ray):
            find_backend(args.backend, precision=args.precision, vae_precision=args.vae_precision).wake()
        from storyadapter.cli.drawing import draw

        clock.mark("imports")
        session = open_session(args, model)
        plan = replace(run.plan, max_frames=args.max_frames)
        clock.mark("model files")
        story = run.story if changed is None else changed.story
        draw(args, story, run.style, plan, session, reporter, clock, edit=changed, edited=True)
    return 0


def _take_over(args: argparse.Namespace, identity: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """What decides the pictures, or drew them, where nothing else was typed."""
    for name, recorded in (
        ("precision", identity.get("precision")),
        ("vae_precision", identity.get("vae_precision")),
        ("backend", details.get("backend")),
    ):
        if getattr(args, name) == AUTO and isinstance(recorded, str):
            setattr(args, name, recorded)
