"""ControlNets on a GPU: compiled and captured, they draw what eager draws, in all steps or in some."""

from pathlib import Path

import numpy as np
import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.backends import find_backend
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.opening import build_engine, open_networks
from storyadapter.method.control import ControlSettings
from storyadapter.method.events import FrameFinished
from storyadapter.model.contract import Range, ShapeRanges, residual_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics
from tests.control_models import poses, write_controlnet
from tests.storyadapter.checkpoint.spoil import tiny_paths

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = ("a red fox runs in the snow", "a small owl sleeps", "the fox and the owl share soup")
RANGES = ShapeRanges(2, 8, Range(64, 64), Range(64, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture per frame, and room for a ControlNet and its engine."""
    folder = tmp_path_factory.mktemp("control")
    for number, picture in enumerate(poses(3)):
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, folder: Path) -> Checkpoint:
    """The tiny model with two ControlNets."""
    files = tuple(write_controlnet(tiny_model_dir, folder / f"controlnet-{seed}", seed) for seed in (0, 1))
    return Checkpoint.open(tiny_paths(tiny_model_dir, controlnets=files))


@pytest.fixture(scope="module")
def networks(model: Checkpoint, folder: Path) -> Networks:
    store = folder / "engines"
    build_engine(model, find_backend("inductor").identity(model, Numerics("fp32")), RANGES, engine_dir=store)
    return open_networks(model, backend="inductor", numerics=Numerics("fp32"), ranges=RANGES, engine_dir=store)


def draw(networks: Networks, model: Checkpoint, folder: Path, *controls: ControlSettings) -> list[np.ndarray]:
    """Two iterations of frames of which the last has no picture, and the second one for the first ControlNet alone."""
    first, second = (str(folder / f"{number}.png") for number in range(2))
    pictures = ({"control": [first, second]}, {"control": [second, None]}, {})
    story = Story([{"prompt": prompt} | given for prompt, given in zip(PROMPTS, pictures, strict=True)])
    plan = RunPlan(
        height=64, width=64, seed=3, steps=6, scales=(0.3,), max_frames=2, controls=controls or (ControlSettings(),) * 2
    )
    pipeline = StoryPipeline(networks, model.load_tokenizers())
    return [np.asarray(e.picture) for e in pipeline.run(story, plan) if isinstance(e, FrameFinished)]


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(one.astype(float) - other).mean(), 1e-9)))


# in some steps both, one or none of them takes part: each of these is a graph of its own
@pytest.mark.parametrize("controls", [(), (ControlSettings(0.6, 0.0, 0.7), ControlSettings(0.8, 0.3, 0.7))])
def test_captured_steps_draw_what_eager_draws(
    networks: Networks, model: Checkpoint, folder: Path, controls: tuple[ControlSettings, ...]
) -> None:
    expected = draw(open_networks(model, device="cpu"), model, folder, *controls)
    runner = networks.run_step
    assert isinstance(runner, GraphStepRunner)
    before = runner.replays
    drawn = draw(networks, model, folder, *controls)
    assert len(drawn) == 6 and runner.replays > before
    assert min(decibels(one, other) for one, other in zip(drawn, expected, strict=True)) >= 40
    # the comparison sees pictures: as by ControlNets that add nothing
    plain = draw(networks, model, folder, ControlSettings(0.0), ControlSettings(0.0))
    assert min(decibels(one, other) for one, other in zip(drawn[:2], plain[:2], strict=True)) < 35
    again = draw(networks, model, folder, *controls)
    assert all(np.array_equal(one, other) for one, other in zip(again, drawn, strict=True))


def test_what_a_controlnet_gives_lies_as_the_denoiser_takes_it(networks: Networks, model: Checkpoint) -> None:
    network = networks["controlnet_0"]
    letters = {"B": 4, "P": 2, "M": 1, "h": 8, "w": 8}
    inputs = {name: value.cuda() for name, value in example_inputs(network.spec, letters, "fp32").items()}
    given = network(inputs)
    assert given.keys() == {tensor.name for tensor in residual_specs(model.geometry.controls[0])}
    assert all(value.is_contiguous() for value in given.values())
    # without a copy: so the code itself gives them
    code = network._call([inputs[tensor.name] for tensor in network.spec.inputs])  # type: ignore[attr-defined]
    assert all(value.is_contiguous() for value in code)
