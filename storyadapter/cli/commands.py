"""The commands `build` and `run`: every check that needs no PyTorch, then the work."""

import argparse
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from storyadapter.cli.control_options import with_controls
from storyadapter.cli.devices import only_device
from storyadapter.cli.options import backend_options, model_choice, option, run_plan, shape_ranges
from storyadapter.cli.reference_vae import check_reference_vae
from storyadapter.cli.reporting import Reporter, count, duration, reporting
from storyadapter.cli.sessions import Session, calibrated_by, open_session
from storyadapter.cli.start_clock import StartClock
from storyadapter.demo.shipped import STORY
from storyadapter.demo.vocabulary import KINDS, examples, unknown_words
from storyadapter.engine.backends import find_backend
from storyadapter.method import constants
from storyadapter.method.errors import InputError, Text, spelled
from storyadapter.method.presets import check_preset
from storyadapter.model.contract import ShapeRanges
from storyadapter.model.numerics import NUMBER_FORMATS, VAE_NUMBER_FORMATS
from storyadapter.output.run_record import stored_identity

if TYPE_CHECKING:
    from storyadapter.method.story import Story

DEFAULT_STYLE = "comic"
OPENING: Final = "importing PyTorch and opening the model"
_NAMED, _LETTERS = 5, 30  # of words that the demo model doesn't know: how many are named, and how much of each
_ANY_SIZE = constants.PIXEL_MULTIPLE  # until the model's own is known


def build(args: argparse.Namespace) -> int:
    """Build the engine of a model, on the device that was asked for, and say where it lies; returns the exit code.

    Raises:
        InputError: it can't be built as typed, or the store can't be written.
        EngineBuildError: an exported network doesn't compute what eager computes.
        RunError: no space is left.
    """
    shape_ranges(args, _ANY_SIZE)  # checks what was typed
    with reporting(args) as reporter, only_device(args.device):
        story = _calibration_story(args, reporter)
        reporter.stage("", OPENING)
        session = open_session(args, model_choice(args))
        options = backend_options(args, session.backend)
        ranges = shape_ranges(args, session.checkpoint.geometry.default_pixels)
        if session.numerics.quantizations:
            session = _calibrated(args, session, story, reporter)
        if session.backend.builds:
            _build(args, session, ranges, options, reporter)
        else:
            text = f"backend {session.backend.name} needs no build: run uses the checkpoint itself"
            reporter.result("built", text, folder=None)
    return 0


def _build(args: argparse.Namespace, session: Session, ranges: ShapeRanges, options: Any, reporter: Reporter) -> None:
    from storyadapter.engine.opening import build_engine

    started = time.perf_counter()
    session.backend.check(session.numerics, ranges)
    identity = session.backend.identity(session.checkpoint, session.numerics, options, reporter.bytes_read)
    reporter.note(
        "build",
        f"build {session.model.label} for {session.how}: up to "
        f"{count(ranges.max_frames, 'frame')} of {ranges.width}x{ranges.height} at once, stories of up to "
        f"{count(ranges.max_references, 'frame')}",
    )
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
    how = f"built in {duration(time.perf_counter() - started)}" if engine.is_new else "was there already"
    text = f"engine {engine.folder} ({engine.bytes / 2**20:,.0f} MiB, {how})"
    reporter.result("built", text, folder=str(engine.folder), bytes=engine.bytes, new=engine.is_new)


def _calibration_story(args: argparse.Namespace, reporter: Reporter) -> "Story | None":
    """The story that calibrates; None for the built-in ones. Raises InputError: it can't be read or drawn, or nothing
    is quantized."""
    if args.calibration_story is None:
        return None
    if args.precision not in NUMBER_FORMATS and args.vae_precision not in VAE_NUMBER_FORMATS:
        expected = f"--precision {' or '.join(NUMBER_FORMATS)}, or --vae-precision {' or '.join(VAE_NUMBER_FORMATS)}"
        raise InputError("--calibration-story calibrates 8-bit products", expected=f"{expected} with it")
    from storyadapter.method.story import Story
    from storyadapter.method.story_notices import story_notices
    from storyadapter.method.story_parts import check_style

    notices: list[Text] = []
    story = Story.from_file(args.calibration_story, on_notice=notices.append)
    for notice in (*notices, *story_notices(story)):
        reporter.note("warning", spelled(notice, option))
    check_style(story.style or DEFAULT_STYLE)
    return story


def _calibrated(args: argparse.Namespace, session: Session, story: "Story | None", reporter: Reporter) -> Session:
    """The session with its model's scales, which are found first where the store has none by these stories; `run` takes
    them from now on.

    Args:
        story: of `--calibration-story`, where it is given.
    """
    from storyadapter.engine.calibration import GivenStory, choose_scales, find_or_make_scales
    from storyadapter.engine.identity import model_weights
    from storyadapter.method.story_files.reading import STANDARD_INPUT

    given = None
    if story is not None:
        path = "" if args.calibration_story == STANDARD_INPUT else os.path.abspath(args.calibration_story)
        title = story.title or os.path.basename(path) or "standard input"
        given = GivenStory(story, story.style or DEFAULT_STYLE, title, path)
    quantizations = session.numerics.quantizations
    started, drawn, first = time.perf_counter(), 0.0, next(iter(quantizations))

    def on_fraction(done: float) -> None:
        nonlocal drawn
        if not drawn:
            what = f'"{given.title}"' if given else "stories of its own"
            reporter.stage(first, f"drawing {what} to see the range of its numbers")
        drawn = done
        reporter.fraction(first, done)

    key = model_weights(session.checkpoint, reporter.bytes_read).key
    scales = find_or_make_scales(
        session.checkpoint, key, quantizations, args.engine_dir, given=given, on_fraction=on_fraction
    )
    if drawn:
        layers = sum(len(own.inputs) for own in scales.values())
        text = f"{count(layers, 'layer')} calibrated in {duration(time.perf_counter() - started)}"
        reporter.stage(first, text)
    choose_scales(args.engine_dir, scales)
    reporter.note("calibrated", calibrated_by(scales))
    return session.quantized(scales)


def run(args: argparse.Namespace) -> int:
    """Draw a story into a folder; returns the exit code.

    Raises:
        InputError: it can't be drawn as typed; nothing was written.
        RunError: it had to stop; finished iterations are kept.
    """
    clock = StartClock()
    with reporting(args) as reporter, only_device(args.device):
        from storyadapter.method.story_notices import story_notices
        from storyadapter.method.story_parts import check_style  # a third of a second, while the status is told

        notices: list[Text] = []
        story = with_controls(args, _story(args, notices.append), notices.append)
        style = check_style(args.style or story.style or DEFAULT_STYLE)
        stored = stored_identity(args.out)
        seed, recorded = _seed(args, stored), _recorded_scales(stored) if args.resume else ()
        if args.prompt_chunks is None:  # a run is gone on with as it was begun, also before the default was another
            args.prompt_chunks = _recorded(stored, "prompt_chunks")
        check_reference_vae(args, run_plan(args, _ANY_SIZE, seed, recorded))
        model = model_choice(args)
        reporter.stage("", OPENING)
        if not (args.workers or args.ray):
            find_backend(args.backend, precision=args.precision, vae_precision=args.vae_precision).wake()
        from storyadapter.cli.drawing import draw

        clock.mark("imports")
        session = open_session(args, model)
        check_preset(args.preset, session.checkpoint.sampling.embeds_guidance)
        plan = run_plan(args, session.checkpoint.geometry.default_pixels, seed, recorded)
        clock.mark("model files")
        for notice in (*notices, *story_notices(story)):
            reporter.note("warning", spelled(notice, option))
        if session.model.paths.is_demo:
            for text in _words_it_does_not_know(story):
                reporter.note("warning", text)
        draw(args, story, style, plan, session, reporter, clock)
    return 0


def _story(args: argparse.Namespace, on_notice: Callable[[Text], None]) -> "Story":
    from storyadapter.method.story import Story

    if args.story:
        return Story.from_arguments(args.story, language=args.language, on_notice=on_notice)
    if args.prompt:
        return Story.from_prompts(args.prompt)
    if args.base_model:
        raise InputError("no story; type --story FILE, or --prompt TEXT with a text per frame")
    return Story.from_file(STORY)


def _words_it_does_not_know(story: "Story") -> Iterator[str]:
    """What is to be said of a story for the demo model: a warning for each kind of words that it was never taught."""
    for kind, words in unknown_words(story.final_prompts("none")).items():
        named = ", ".join(f'"{word[:_LETTERS]}"' for word in words[:_NAMED]) + (", …" if len(words) > _NAMED else "")
        known = ", ".join(examples(kind))
        yield f"the demo model doesn't know {named}; {KINDS[kind]} it knows: {known}. Others need an SDXL checkpoint"


def _recorded(stored: Mapping[str, Any] | None, setting: str) -> Any:
    """A setting of the run which `--out` already holds; None if there is none."""
    plan = stored.get("plan") if stored else None
    return plan.get(setting) if isinstance(plan, dict) else None


def _recorded_scales(stored: Mapping[str, Any] | None) -> tuple[float, ...]:
    scales = _recorded(stored, "scales")
    return tuple(scales) if isinstance(scales, list) else ()


def _seed(args: argparse.Namespace, stored: Mapping[str, Any] | None) -> int:
    """The seed asked for, that of the run which `--out` already holds, or a fresh one."""
    if args.seed is not None:
        return args.seed
    seed = _recorded(stored, "seed")
    return seed if isinstance(seed, int) else secrets.randbelow(2**32)
