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
from storyadapter.model.numerics import Numerics, Quantization
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
    asked = {"denoiser": Quantization("fp8")}
    return calibration.find_or_make_scales(checkpoint, model_weights(checkpoint).key, asked, store, steps=2)["denoiser"]


def opened(checkpoint: Checkpoint, scales: Scales | None, store: Path, backend: str) -> Networks:
    """The model in fp16, or in fp8 by these scales; an engine is built first where there is none."""
    numerics = checkpoint.geometry.numerics("fp16", quantization=scales and Quantization("fp8", scales.key))
    model = checkpoint if scales is None else checkpoint.rewritten({"denoiser": scales.apply})
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


def test_the_vae_decodes_as_its_emulation_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    key, asked = model_weights(checkpoint).key, {"vae_decoder": Quantization("fp8")}
    scales = calibration.find_or_make_scales(checkpoint, key, asked, tmp_path, steps=2)
    plain = checkpoint.geometry.numerics("fp16", Quantization("fp8"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()

    def decoded(backend: str, own: dict[str, Scales]) -> torch.Tensor:
        model, numerics = calibration.quantized(checkpoint, plain, own)
        if find_backend(backend).builds:
            build_engine(model, find_backend(backend).identity(model, numerics), RANGES, engine_dir=tmp_path)
        networks = open_networks(model, backend=backend, numerics=numerics, ranges=RANGES, engine_dir=tmp_path)
        if backend == "inductor":
            weights = networks["vae_decoder"].weights.values()
            own_layers = len(own["vae_decoder"].inputs)
            assert sum(value.dtype == torch.float8_e4m3fn for value in weights) == own_layers > 4
        return networks["vae_decoder"]({"latents": latents.bfloat16()})["image"].float()

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    exact = open_networks(checkpoint, numerics=Numerics("fp32"))["vae_decoder"]({"latents": latents})["image"]
    emulated = decoded("eager", scales)
    assert error(decoded("inductor", scales), emulated) < 0.1 and 1e-3 < error(emulated, exact) < 0.2
    own = scales["vae_decoder"]
    wrong = replace(own, inputs={name: scale / 64 for name, scale in own.inputs.items()})
    clipped = decoded("inductor", {"vae_decoder": wrong})  # by the same code
    ((_,), _) = EngineStore(tmp_path).scan()
    assert error(clipped, exact) > 2 * error(emulated, exact)
