"""A model in fp8 on a GPU: the engine draws what eager's emulation draws, and serves other scales without a build."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine import calibration
from storyadapter.engine.backends import find_backend
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import build_engine, open_networks
from storyadapter.engine.store import EngineStore
from storyadapter.engine.uses import ERRORS
from storyadapter.method.events import FrameFinished
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Quantization
from storyadapter.quantization.scales import Scales

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA GPU with fp8"
)
pytest.importorskip("modelopt", reason="needs nvidia-modelopt")

STORY = Story(("a red fox runs in the snow", "a small owl sleeps", "the fox and the owl share soup"), style="none")
RANGES = ShapeRanges(2, 8, Range(64, 64), Range(64, 64))
PLAN = RunPlan(height=64, width=64, seed=3, steps=4, scales=(), max_frames=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def scales(checkpoint: Checkpoint, store: Path) -> Scales:
    return calibration.find_or_make_scales(checkpoint, model_weights(checkpoint).key, "fp8", store, steps=2)


def opened(checkpoint: Checkpoint, scales: Scales | None, store: Path, backend: str) -> Networks:
    """The model in fp16, or in fp8 by these scales; an engine is built first where there is none."""
    numerics = checkpoint.geometry.numerics("fp16", quantization=scales and Quantization("fp8", scales.key))
    model = checkpoint if scales is None else checkpoint.rewritten(scales.apply)
    if find_backend(backend).builds:
        build_engine(model, find_backend(backend).identity(model, numerics), RANGES, engine_dir=store)
    return open_networks(model, backend=backend, numerics=numerics, ranges=RANGES, engine_dir=store)


def pictures(networks: Networks, checkpoint: Checkpoint) -> list[np.ndarray]:
    pipeline = StoryPipeline(networks, checkpoint.load_tokenizers())
    return [np.asarray(e.picture, float) for e in pipeline.run(STORY, PLAN) if isinstance(e, FrameFinished)]


def decibels(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return float(np.median([10 * np.log10(255**2 / np.square(a - b).mean()) for a, b in zip(one, other, strict=True)]))


def test_the_engine_draws_as_the_emulation_does(checkpoint: Checkpoint, scales: Scales, store: Path) -> None:
    networks = opened(checkpoint, scales, store, "inductor")
    ((engine,), _) = EngineStore(store).scan()
    assert engine.identity.numerics.name == "fp8" and networks.numerics.quantization == Quantization("fp8", scales.key)
    assert 1e-4 < engine.details[ERRORS]["denoiser"] < 0.2  # of so small a model rounding alone costs 0.11
    eighths = sum(value.dtype == torch.float8_e4m3fn for value in networks["denoiser"].weights.values())
    assert eighths > 20
    drawn, emulated = pictures(networks, checkpoint), pictures(opened(checkpoint, scales, store, "eager"), checkpoint)
    exact = pictures(opened(checkpoint, None, store, "eager"), checkpoint)
    assert decibels(drawn, emulated) > 22 and decibels(drawn, exact) > 22
    assert isinstance(networks.run_step, GraphStepRunner) and networks.run_step.replays > 0

    # scales are read with the weights: others need no build, and draw otherwise
    clipped = replace(scales, inputs={name: scale / 32 for name, scale in scales.inputs.items()})
    other = opened(checkpoint, clipped, store, "inductor")
    ((same,), _) = EngineStore(store).scan()
    assert same.folder == engine.folder
    spoilt = pictures(other, checkpoint)
    assert decibels(spoilt, exact) < decibels(drawn, exact) - 5
    assert decibels(spoilt, pictures(opened(checkpoint, clipped, store, "eager"), checkpoint)) > 30
