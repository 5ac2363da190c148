"""Backend inductor on a GPU: what it draws, that a step is captured, and that nothing waits inside the loop."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.backends import BACKENDS
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.opening import build_engine, open_networks
from storyadapter.method.events import FrameFinished, IterationFinished, StepFinished
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.networks import Networks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STORY = Story(("a red fox runs in the snow", "a small owl sleeps", "the fox and the owl share soup"), style="none")
SIZES = Range(64, 64)
RANGES = ShapeRanges(2, 8, SIZES, SIZES)
PLAN = RunPlan(height=64, width=64, seed=3, steps=4, scales=(0.3, 0.5), max_frames=2)


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint, tiny_inductor_dir: Path) -> Networks:
    # the fixture's engine is built for the device that is here
    return open_networks(checkpoint, backend="inductor", ranges=RANGES, engine_dir=tiny_inductor_dir)


@pytest.fixture
def told_when_the_host_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def draw(networks: Networks, checkpoint: Checkpoint, plan: RunPlan = PLAN, story: Story = STORY) -> list[np.ndarray]:
    pipeline = StoryPipeline(networks, checkpoint.load_tokenizers())
    return [np.asarray(e.picture) for e in pipeline.run(story, plan) if isinstance(e, FrameFinished)]


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(one.astype(float) - other).mean(), 1e-9)))


def test_draws_what_eager_draws(networks: Networks, checkpoint: Checkpoint) -> None:
    expected = draw(open_networks(checkpoint, device="cpu"), checkpoint)
    drawn = draw(networks, checkpoint)
    assert len(drawn) == 9
    # a GPU's convolutions take their factors in TF32
    assert min(decibels(one, other) for one, other in zip(drawn, expected, strict=True)) >= 40


def test_an_engine_for_longer_prompts_draws_what_eager_draws(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ranges, numerics = replace(RANGES, max_prompt_chunks=3), checkpoint.geometry.numerics("fp32")
    build_engine(checkpoint, BACKENDS["inductor"].identity(checkpoint, numerics), ranges, engine_dir=tmp_path)
    words = " ".join(f"a red fox number {n} runs in the snow" for n in range(6))
    # of three chunks, two and one
    story = Story((f"{words}, then it sleeps under the sea", words[:130], "a small owl"), style="none")
    plan = replace(PLAN, prompt_chunks="auto", negative_prompt="blurry")
    eager = open_networks(checkpoint, device="cpu")
    expected = draw(eager, checkpoint, plan, story)
    cut = draw(eager, checkpoint, replace(plan, prompt_chunks="1"), story)
    opened = open_networks(checkpoint, backend="inductor", numerics=numerics, ranges=ranges, engine_dir=tmp_path)
    drawn = draw(opened, checkpoint, plan, story)
    assert min(decibels(one, other) for one, other in zip(drawn, expected, strict=True)) >= 40
    assert max(decibels(one, other) for one, other in zip(cut[:2], expected, strict=False)) < 30  # the words are read


def test_steps_are_captured_once_per_shape(networks: Networks, checkpoint: Checkpoint) -> None:
    runner = networks.run_step
    assert isinstance(runner, GraphStepRunner)
    pipeline = StoryPipeline(networks, checkpoint.load_tokenizers())
    stories = [
        [np.asarray(e.picture) for e in pipeline.run(STORY, PLAN) if isinstance(e, FrameFinished)] for _ in range(3)
    ]
    before = runner.captures
    again = [np.asarray(e.picture) for e in pipeline.run(STORY, PLAN) if isinstance(e, FrameFinished)]
    assert runner.captures == before and runner.replays > 0
    assert all(np.array_equal(one, other) for one, other in zip(again, stories[-1], strict=True))


def test_a_fresh_process_compiles_nothing(tiny_model_dir: Path, tiny_inductor_dir: Path, tmp_path: Path) -> None:
    run = [
        *(sys.executable, "-m", "storyadapter", "run", "--base-model", str(tiny_model_dir)),
        *("--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "inductor"),
        *("--precision", "fp32", "--steps", "2", "--iterations", "1", "--prompt", "a fox", "an owl"),
        *("--style", "none", "--engine-dir", str(tiny_inductor_dir), "--out", str(tmp_path / "out")),
    ]
    compiled = tmp_path / "compiled"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert not list(compiled.rglob("*.cpp")) and "mismatch" not in done.stderr


@pytest.mark.usefixtures("told_when_the_host_waits")
def test_nothing_is_copied_between_host_and_device_inside_the_loop(networks: Networks, checkpoint: Checkpoint) -> None:
    pipeline = StoryPipeline(networks, checkpoint.load_tokenizers())
    assert [event for event in pipeline.run(STORY, PLAN) if isinstance(event, StepFinished)]  # warms up and captures
    for event in pipeline.run(STORY, PLAN):
        if isinstance(event, StepFinished):
            torch.cuda.set_sync_debug_mode("error")
        if isinstance(event, IterationFinished):
            torch.cuda.set_sync_debug_mode("default")
