"""`storyadapter-trt run`: every check that needs no PyTorch, then the drawing."""

import argparse
import secrets
from collections.abc import Mapping
from typing import Any

from storyadapter.cli.options import model_choice, run_plan
from storyadapter.cli.reporting import reporter_for
from storyadapter.cli.session import open_session
from storyadapter.demo.shipped import STORY
from storyadapter.method import constants
from storyadapter.method.errors import InputError
from storyadapter.method.story import Story, check_style
from storyadapter.output.run_record import stored_identity

DEFAULT_STYLE = "comic"
_ANY_SIZE = constants.PIXEL_MULTIPLE  # until the model's own is known


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

    reporter = reporter_for(args)
    try:
        draw(args, story, style, plan, session, reporter)
    finally:
        reporter.close()
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
