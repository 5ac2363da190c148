"""The scales of a quantized model: kept in the engine store, found by letting the model draw stories."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backend import default_device
from storyadapter.engine.eager.networks import EagerNetwork, open_eager
from storyadapter.engine.store import EngineStore
from storyadapter.method.errors import InputError
from storyadapter.method.events import StepFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.numerics import NumberFormat
from storyadapter.quantization.calibration import calibrate
from storyadapter.quantization.recipe import RECIPES, Recipe
from storyadapter.quantization.scales import Scales
from storyadapter.runtime.pipeline import StoryPipeline

# 64 frames without references (λ = 0) and with those of their own story at the largest published λ
_FRAMES: Final = 8
_SCALE: Final = 0.5
_STEPS: Final = 12
_WHO: Final = ("a fox", "an old sailor", "two children", "a robot", "a queen", "a white cat", "a painter", "a dragon")
_WHAT: Final = (
    "wakes up in a small room at dawn",
    "walks through a crowded market in the rain",
    "crosses a river on a wooden bridge",
    "reads a letter beside a lamp at night",
    "climbs a snowy mountain under a blue sky",
    "cooks soup in a bright kitchen",
    "dances at a feast among many friends",
    "sails home at sunset, seen from far away",
)


def calibration_stories() -> Iterator[Story]:
    """Eight stories of eight frames, each with a character of its own."""
    for who in _WHO:
        yield Story.from_prompts([f"{who} {what}" for what in _WHAT])


def find_scales(engine_dir: Path | None, model: str, number_format: NumberFormat) -> Scales | None:
    """The scales of a model by the key of its weights; None if the store has none of this version's recipe.

    Raises:
        InputError: the store has some that can't be used.
    """
    folder = _folder(engine_dir, model, number_format)
    if not folder.is_dir():
        return None
    scales = Scales.load(folder, model)
    return scales if scales.recipe == RECIPES[number_format] else None


def find_or_make_scales(
    checkpoint: Checkpoint,
    model: str,
    number_format: NumberFormat,
    engine_dir: Path | None = None,
    *,
    steps: int = _STEPS,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> Scales:
    """The scales of a model from the store, or else by calibration, which draws its own stories in half precision (on a
    CPU in fp32), and then keeps them there.

    Args:
        model: the key of the checkpoint's weights.
        steps: denoising steps of each frame.
        on_fraction: told how much of the drawing is done.

    Raises:
        UnavailableError: nvidia-modelopt isn't installed.
        InputError: the store can't be read or written, or the model's activations aren't finite.
    """
    with suppress(InputError):  # what can't be used is found again
        if (found := find_scales(engine_dir, model, number_format)) is not None:
            return found
    recipe = RECIPES[number_format]
    scales = Scales(recipe, model, *_measure(checkpoint, recipe, default_device(), steps, on_fraction))
    _keep(scales, _folder(engine_dir, model, number_format))
    return scales


def _measure(
    checkpoint: Checkpoint, recipe: Recipe, device: torch.device, steps: int, on_fraction: Callable[[float], None]
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    # pictures are read by CLIP alone: the VAE's fast precision will do
    numerics = checkpoint.geometry.numerics(*(("fp16", "bf16") if device.type == "cuda" else ("fp32", None)))
    networks = open_eager(checkpoint, numerics, device, lambda network: None)
    denoiser, pixels = networks["denoiser"], checkpoint.geometry.default_pixels
    assert isinstance(denoiser, EagerNetwork)
    plan = RunPlan(height=pixels, width=pixels, scales=(_SCALE,), steps=steps, seed=0, max_frames=_FRAMES)
    plan = plan.for_model(checkpoint.sampling)
    stories = tuple(calibration_stories())
    calls = len(stories) * plan.iterations * steps

    def draw() -> None:
        pipeline, done = StoryPipeline(networks, checkpoint.load_tokenizers()), itertools.count(1)
        for story in stories:
            for event in pipeline.run(story, plan):
                if isinstance(event, StepFinished):
                    on_fraction(min(next(done) / calls, 1.0))

    return calibrate(denoiser.module, recipe, draw)


def _folder(engine_dir: Path | None, model: str, number_format: NumberFormat) -> Path:
    return EngineStore(engine_dir).root / f".scales-{number_format}-{model}"  # hidden: it isn't an engine


def _keep(scales: Scales, folder: Path) -> None:
    unfinished = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        scales.save(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        raise InputError(f"{folder.parent} can't be written: {error.strerror}") from error
