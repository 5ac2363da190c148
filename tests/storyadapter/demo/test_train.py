"""The training runs end to end at toy size, goes on where it stopped, and its gates close."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil

from storyadapter.demo.dataset import mixed_scenes
from storyadapter.demo.loop import Budget, Log, optimize
from storyadapter.demo.scenes import draw
from storyadapter.demo.train import STAGES, TOY, GateError, Training, resizer, run, whiten


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("training")
    run(STAGES, TOY, work, work / "model", seed=1)
    return work


def _lines(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def test_every_stage_leaves_its_log(trained: Path) -> None:
    assert {line["stage"] for line in _lines(trained)} == {"data", "judge", "vae", "gate", "clip", "unet", "export"}


def test_what_it_writes_draws_in_plain_diffusers(trained: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(trained / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a fox", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 128, 128) and torch.isfinite(picture).all()


def test_finished_stages_are_not_done_again_unless_asked(trained: Path) -> None:
    before = (trained / "vae.pt").read_bytes()
    lines = len(_lines(trained))
    run(("data", "vae"), TOY, trained, trained / "model", seed=1)
    assert (trained / "vae.pt").read_bytes() == before and len(_lines(trained)) == lines
    run(("vae",), TOY, trained, trained / "model", seed=1, again=True)
    assert (trained / "vae.pt").read_bytes() != before


def test_a_gate_that_is_not_met_stops_the_run(trained: Path) -> None:
    strict = replace(TOY, floor=0.95)
    with pytest.raises(GateError, match="judge on drawings.*below 0.95"):
        Training(strict, trained, 1).judge()


def test_latents_have_unit_deviation_under_the_scaling_factor(trained: Path) -> None:
    training = Training(TOY, trained, 1)
    vae = training._trained("vae", "vae")
    latents = training._latents(vae, training._load("world")[0])
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
    assert latents.mean((0, 2, 3)).abs().max() < 0.02


def test_whitening_changes_no_picture(trained: Path) -> None:
    training = Training(TOY, trained, 1)
    vae, x = training._trained("vae", "vae"), torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        noise = vae.encode(x).latent_dist.std / vae.encode(x).latent_dist.mean.std()
        whiten(vae, torch.randn(8, 4, 4, 4) * torch.tensor([1.0, 2, 3, 4])[:, None, None] + 5)
        after = vae.decode(vae.encode(x).latent_dist.mean).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert torch.isfinite(noise).all()


def test_references_are_resized_as_the_method_does() -> None:
    picture = draw(mixed_scenes(1, seed=4)[0])
    expected = CLIPImageProcessorPil()(picture.resize((256, 256)), return_tensors="pt").pixel_values[0]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    found = resizer(torch.device("cpu"))(pixels)[0]
    assert (found - expected).abs().mean() < 0.005  # Pillow rounds to 8 bits twice on the way
    nearest = CLIPImageProcessorPil()(picture.resize((224, 224), Image.Resampling.NEAREST), return_tensors="pt")
    assert (nearest.pixel_values[0] - expected).abs().mean() > 0.05


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def train(name: str, stop_after: int | None) -> torch.nn.Linear:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        calls = 0

        def losses() -> dict[str, torch.Tensor]:
            nonlocal calls
            calls += 1
            if stop_after and calls > stop_after:
                raise KeyboardInterrupt
            return {"error": ((network(torch.eye(4)).diagonal() - torch.arange(4.0)) ** 2).mean()}

        budget = Budget(steps=600, batch=1, rate=0.05, average=0.9)
        optimize("fit", losses, [network], budget, Log(tmp_path / "log"), tmp_path / name, save_every=0)
        return network

    whole = train("whole", stop_after=None)
    assert (whole(torch.eye(4)).diagonal() - torch.arange(4.0)).abs().max() < 0.1
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop_after=450)
    assert torch.load(tmp_path / "stopped", weights_only=True)["step"] == 400
    torch.testing.assert_close(train("stopped", stop_after=None).weight, whole.weight, rtol=0, atol=0)
    assert not (tmp_path / "stopped").exists()


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)

    def losses() -> dict[str, torch.Tensor]:
        return {"bad": network.weight.sum() * float("nan")}

    with pytest.raises(FloatingPointError, match="fit: loss at step 1 is not finite"):
        optimize("fit", losses, [network], Budget(1, 1, 0.1), Log(tmp_path / "log"))
