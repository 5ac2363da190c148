"""The eager backend on a GPU draws what it draws on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method.events import FrameFinished
from storyadapter.model.numerics import Precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = ("a red fox runs in the snow", "a small owl sleeps in a tree at night", "the fox and the owl share soup")


def draw(folder: Path, device: str, precision: Precision) -> list[Image.Image]:
    paths = {"image_encoder": folder / "image_encoder", "ip_adapter": folder / "ip-adapter.safetensors"}
    checkpoint = Checkpoint.open(base_model=folder, **paths)
    networks = open_networks(
        checkpoint, backend="eager", numerics=checkpoint.geometry.numerics(precision), device=device
    )
    plan = RunPlan(height=64, width=64, seed=3, steps=4, scales=(0.3, 0.5), max_frames=2)
    events = StoryPipeline(networks, checkpoint.load_tokenizers()).run(Story(PROMPTS), plan)
    return [event.picture for event in events if isinstance(event, FrameFinished)]


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, float) - np.asarray(other, float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# ten times the noise of each precision away from a mistake, which gives below 30 dB on these pictures
@pytest.mark.parametrize(("precision", "decibels"), [("fp32", 50.0), ("fp16", 34.0)])
def test_a_seed_means_the_same_on_every_device(tiny_model_dir: Path, precision: Precision, decibels: float) -> None:
    expected = draw(tiny_model_dir, "cpu", "fp32")
    drawn = draw(tiny_model_dir, "cuda", precision)
    assert min(psnr(one, other) for one, other in zip(drawn, expected, strict=True)) >= decibels
