"""The eager backend on a GPU draws what it draws on the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method.events import FrameFinished
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.runtime.clock import StageClock
from storyadapter.runtime.decoding import FrameDecoder
from tests.storyadapter.checkpoint.spoil import tiny_paths
from tests.storyadapter.runtime.test_decoding import tasks, told
from tests.storyadapter.runtime.test_decoding_again import scaled

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


def test_a_frame_that_overflows_is_decoded_again_beside_other_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_paths(scaled(tiny_model_dir, tmp_path / "model", 500)))
    networks = open_networks(checkpoint, numerics=Numerics("fp16"), device="cuda")
    latents = torch.randn(5, 4, 8, 8, generator=torch.manual_seed(0)).cuda()
    latents[3] *= 30

    def decoded(latents: torch.Tensor, load: bool = True) -> list[tuple[bool, bytes | None]]:
        decoder = FrameDecoder(networks if load else replace(networks, load_fp32=None), overlapped=True)
        decoder.submit(tasks(range(len(latents))), latents, StageClock(networks.device), None)
        found = [(one.again, one.picture and one.picture.tobytes()) for one in told(decoder)]
        decoder.close()
        return found

    again, once = decoded(latents), decoded(latents, load=False)
    assert [frame for frame, (redone, _) in enumerate(again) if redone] == [3]
    assert once[3] == (False, None)
    assert again[:3] + again[4:] == once[:3] + once[4:]
