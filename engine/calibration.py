"""The scales of a model's quantized networks: kept in the engine store, found by letting the model draw stories."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backend import default_device
from storyadapter.engine.eager.networks import EagerNetwork, open_eager
from storyadapter.engine.store import EngineStore
from storyadapter.method.errors import InputError
from storyadapter.method.events import StepFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.numerics import NumberFormat, Numerics, Quantization
from storyadapter.quantization.calibration import calibrate
from storyadapter.quantization.recipe import Recipe, recipe_of
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


def find_scales(
    engine_dir: Path | None, model: str, quantizations: Mapping[str, Quantization]
) -> dict[str, Scales] | None:
    """The scales of a model's networks by the key of its weights; None if the store lacks some of these recipes.

    Args:
        quantizations: of networks, by name, as `Numerics.quantizations` gives them.

    Raises:
        InputError: the store has some that can't be used.
    """
    found = {}
    for network, quantization in quantizations.items():
        folder = _folder(engine_dir, model, network, quantization.number_format)
        if not folder.is_dir():
            return None
        scales = Scales.load(folder, model)
        if scales.recipe != recipe_of(network, quantization.number_format):
            return None
        found[network] = scales
    return found


def find_or_make_scales(
    checkpoint: Checkpoint,
    model: str,
    quantizations: Mapping[str, Quantization],
    engine_dir: Path | None = None,
    *,
    steps: int = _STEPS,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Scales]:
    """The scales of a model's networks from the store, or else by calibration, which draws its own stories in half
    precision (on a CPU in fp32), once for all networks that lack some, and then keeps them there.

    Args:
        model: the key of the checkpoint's weights.
        quantizations: of networks, by name, as `Numerics.quantizations` gives them.
        steps: denoising steps of each frame.
        on_fraction: told how much of the drawing is done.

    Raises:
        UnavailableError: nvidia-modelopt isn't installed.
        InputError: the store can't be read or written, or the model's activations aren't finite.
    """
    found: dict[str, Scales] = {}
    for network, quantization in quantizations.items():
        with suppress(InputError):  # what can't be used is found again
            found |= find_scales(engine_dir, model, {network: quantization}) or {}
    recipes = {name: recipe_of(name, q.number_format) for name, q in quantizations.items() if name not in found}
    if recipes:
        for network, measured in _measure(checkpoint, recipes, default_device(), steps, on_fraction).items():
            found[network] = Scales(recipes[network], model, *measured)
            _keep(found[network], _folder(engine_dir, model, network, recipes[network].number_format))
    return found


def quantized(checkpoint: Checkpoint, numerics: Numerics, scales: Mapping[str, Scales]) -> tuple[Checkpoint, Numerics]:
    """A model whose networks are quantized by these scales when they are loaded, and its numerics with their keys."""
    rewritten = checkpoint.rewritten({network: own.apply for network, own in scales.items()})
    return rewritten, numerics.with_scales({network: own.key for network, own in scales.items()})


_Measured = tuple[dict[str, float], dict[str, tuple[float, ...]]]  # as `calibrate` gives it


def _measure(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    device: torch.device,
    steps: int,
    on_fraction: Callable[[float], None],
) -> dict[str, _Measured]:
    """What one drawing of the stories shows of each of these networks."""
    # in the VAE's fast precision, in which its products are quantized as well; CLIP alone reads the pictures
    numerics = checkpoint.geometry.numerics(*(("fp16", "bf16") if device.type == "cuda" else ("fp32", None)))
    networks = open_eager(checkpoint, numerics, device, lambda network: None)
    pixels = checkpoint.geometry.default_pixels
    plan = RunPlan(height=pixels, width=pixels, scales=(_SCALE,), steps=steps, seed=0, max_frames=_FRAMES)
    plan = plan.for_model(checkpoint.sampling)
    stories = tuple(calibration_stories())
    calls = len(stories) * plan.iterations * steps
    measured: dict[str, _Measured] = {}

    def draw() -> None:
        pipeline, done = StoryPipeline(networks, checkpoint.load_tokenizers()), itertools.count(1)
        for story in stories:
            for event in pipeline.run(story, plan):
                if isinstance(event, StepFinished):
                    on_fraction(min(next(done) / calls, 1.0))

    def measuring(network: str, inner: Callable[[], Any]) -> Callable[[], Any]:
        """What `inner` draws, with this network's layers watched."""
        own = networks[network]
        assert isinstance(own, EagerNetwork)

        def watched() -> None:
            measured[network] = calibrate(own.module, recipes[network], inner)

        return watched

    work: Callable[[], Any] = draw
    for network in recipes:
        work = measuring(network, work)
    work()
    return measured


def _folder(engine_dir: Path | None, model: str, network: str, number_format: NumberFormat) -> Path:
    of = "" if network == "denoiser" else f"{network}-"  # as before others were quantized
    return EngineStore(engine_dir).root / f".scales-{of}{number_format}-{model}"  # hidden: it isn't an engine


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
