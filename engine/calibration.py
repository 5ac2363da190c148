"""The scales of a model's quantized networks: kept in the engine store, found by letting the model draw stories."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backend import default_device
from storyadapter.engine.eager.networks import EagerNetwork, open_eager
from storyadapter.engine.store import EngineStore
from storyadapter.method.control import ControlSettings
from storyadapter.method.control_pictures import control_identity, read_controls
from storyadapter.method.errors import InputError
from storyadapter.method.events import StepFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.numerics import NumberFormat, Numerics, Quantization
from storyadapter.output.files import write_whole
from storyadapter.quantization.calibration import calibrate
from storyadapter.quantization.recipe import Recipe, recipe_of
from storyadapter.quantization.scales import CalibrationStory, Scales
from storyadapter.runtime.given_pictures import picture_keys, pictures_of_frames
from storyadapter.runtime.pipeline import StoryPipeline

# 64 frames without references (λ = 0) and with those of their own story at the largest published λ
_FRAMES: Final = 8
_LEAST: Final = 64  # frames that are drawn; a shorter story is drawn again with other seeds
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


@dataclass(frozen=True)
class GivenStory:
    """A story of the user's that is drawn in place of the built-in ones, as `run` draws it.

    Attributes:
        style: in which.
        title: that names it for people.
        path: of its file; "" where it has none.
    """

    story: Story
    style: str
    title: str
    path: str = ""

    def described(self, plan: RunPlan) -> CalibrationStory:
        """As it stands in the scales that it finds. Raises InputError: a picture that it names can't be used."""
        drawn = [
            [asdict(frame) for frame in self.story.final_frames(plan, self.style)],
            picture_keys(pictures_of_frames(self.story)),
            control_identity(read_controls(self.story, plan)),
        ]
        digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:32]
        return CalibrationStory(digest, self.title, self.path)


def find_scales(
    engine_dir: Path | None, model: str, quantizations: Mapping[str, Quantization]
) -> dict[str, Scales] | None:
    """The scales of a model's networks by the key of its weights: by the stories that `choose_scales` chose, or else by
    the built-in ones. None if the store lacks some of these recipes.

    Args:
        quantizations: of networks, by name, as `Numerics.quantizations` gives them.

    Raises:
        InputError: the store has some that can't be used.
    """
    found = {}
    for network, quantization in quantizations.items():
        place = _folder(engine_dir, model, network, quantization.number_format)
        if (scales := _load(_chosen(place), model, network, quantization.number_format)) is None:
            return None
        found[network] = scales
    return found


def _load(folder: Path, model: str, network: str, number_format: NumberFormat) -> Scales | None:
    if not folder.is_dir():
        return None
    scales = Scales.load(folder, model)
    return scales if scales.recipe == recipe_of(network, number_format) else None


def choose_scales(engine_dir: Path | None, scales: Mapping[str, Scales]) -> None:
    """From now on `find_scales` gives these, of the store's. Raises InputError: it can't be written."""
    for network, own in scales.items():
        place = _folder(engine_dir, own.model, network, own.recipe.number_format)
        chosen = _by(place, own.story)
        with suppress(InputError):  # a choice that can't be read is made again
            if _chosen(place) == chosen:
                continue
        try:
            if chosen == place:
                _choice(place).unlink()
            else:
                write_whole(_choice(place), chosen.name.encode())
        except OSError as error:
            raise InputError(f"{place.parent} can't be written: {error.strerror}") from error


def find_or_make_scales(
    checkpoint: Checkpoint,
    model: str,
    quantizations: Mapping[str, Quantization],
    engine_dir: Path | None = None,
    *,
    given: GivenStory | None = None,
    steps: int = _STEPS,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Scales]:
    """The scales of a model's networks from the store, or else by calibration, which draws stories in half precision
    (on a CPU in fp32), once for all networks that lack some, and then keeps them there, beside those by other stories.

    Args:
        model: the key of the checkpoint's weights.
        quantizations: of networks, by name, as `Numerics.quantizations` gives them.
        given: is drawn; by default the built-in stories are.
        steps: denoising steps of each frame.
        on_fraction: told how much of the drawing is done.

    Raises:
        UnavailableError: nvidia-modelopt isn't installed.
        InputError: the store can't be read or written, the model's activations aren't finite, or the story given can't
            be drawn by this model.
    """
    plan = _plan(checkpoint, steps)
    story = given.described(plan) if given else None
    found: dict[str, Scales] = {}
    places = {
        network: _by(_folder(engine_dir, model, network, quantization.number_format), story)
        for network, quantization in quantizations.items()
    }
    for network, quantization in quantizations.items():
        with suppress(InputError):  # what can't be used is found again
            if (scales := _load(places[network], model, network, quantization.number_format)) is not None:
                found[network] = scales
    recipes = {name: recipe_of(name, q.number_format) for name, q in quantizations.items() if name not in found}
    if recipes:
        drawn = _again(given, plan) if given else [(own, None, plan) for own in calibration_stories()]
        for network, measured in _measure(checkpoint, recipes, default_device(), drawn, on_fraction).items():
            found[network] = Scales(recipes[network], model, *measured, story)
            _keep(found[network], places[network])
    return found


def _plan(checkpoint: Checkpoint, steps: int) -> RunPlan:
    pixels, controls = checkpoint.geometry.default_pixels, (ControlSettings(),) * len(checkpoint.geometry.controls)
    plan = RunPlan(height=pixels, width=pixels, scales=(_SCALE,), steps=steps, seed=0, max_frames=_FRAMES)
    return replace(plan.for_model(checkpoint.sampling), controls=controls)


_Drawing = tuple[Story, str | None, RunPlan]  # a story, its style, and how it is drawn


def _again(given: GivenStory, plan: RunPlan) -> list[_Drawing]:
    """A story as often as it takes to as many frames as the built-in ones have, each time with another seed."""
    times = -(-_LEAST // len(given.story.frames))
    return [(given.story, given.style, replace(plan, seed=seed)) for seed in range(times)]


def quantized(checkpoint: Checkpoint, numerics: Numerics, scales: Mapping[str, Scales]) -> tuple[Checkpoint, Numerics]:
    """A model whose networks are quantized by these scales when they are loaded, and its numerics with their keys."""
    rewritten = checkpoint.rewritten({network: own.apply for network, own in scales.items()})
    return rewritten, numerics.with_scales({network: own.key for network, own in scales.items()})


_Measured = tuple[dict[str, float], dict[str, tuple[float, ...]]]  # as `calibrate` gives it


def _measure(
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    device: torch.device,
    drawings: Sequence[_Drawing],
    on_fraction: Callable[[float], None],
) -> dict[str, _Measured]:
    """What one drawing of each story shows of each of these networks."""
    # in the VAE's fast precision, in which its products are quantized as well; CLIP alone reads the pictures
    numerics = checkpoint.geometry.numerics(*(("fp16", "bf16") if device.type == "cuda" else ("fp32", None)))
    networks = open_eager(checkpoint, numerics, device, lambda network: None)
    whole = sum(len(story.frames) * sum(map(plan.steps_in, range(plan.iterations))) for story, _, plan in drawings)
    measured: dict[str, _Measured] = {}

    def draw() -> None:
        pipeline, done = StoryPipeline(networks, checkpoint.load_tokenizers()), 0
        for story, style, plan in drawings:
            for event in pipeline.run(story, plan, style=style):
                if isinstance(event, StepFinished):
                    done += len(event.frames)
                    on_fraction(min(done / whole, 1.0))

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


def _by(folder: Path, story: CalibrationStory | None) -> Path:
    """Of scales by the built-in stories their folder; of others one beside it."""
    return folder if story is None else folder.with_name(f"{folder.name}-{story.digest}")


def _choice(folder: Path) -> Path:
    """The file that names which of the folders beside it was chosen."""
    return folder.with_name(f"{folder.name}.chosen")


def _chosen(folder: Path) -> Path:
    try:
        name = _choice(folder).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise InputError(f"{_choice(folder)} can't be read: {error.strerror}") from error
    if not name.startswith(folder.name) or len(Path(name).parts) != 1:
        raise InputError(f"{_choice(folder)} is damaged", advice="build again")
    return folder.with_name(name)


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
