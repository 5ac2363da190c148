"""The training runs end to end at toy size, goes on where it stopped, and its gates close."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil

from storyadapter.demo.training import train
from storyadapter.demo.training.dataset import mixed_scenes
from storyadapter.demo.training.loop import Budget, optimize
from storyadapter.demo.training.pictures import resizer
from storyadapter.demo.training.scenes import draw
from storyadapter.demo.training.train import STAGES, TOY, Training, main, whiten
from storyadapter.method.errors import InputError, RunError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("training")
    Training(TOY, work, work / "model").run(STAGES)
    return work


@pytest.fixture
def training(trained: Path) -> Training:
    """The finished training, its networks loaded."""
    training = Training(TOY, trained, trained / "model")
    training.run(STAGES)
    return training


def _lines(work: Path) -> list[str]:
    return (work / "log.txt").read_text().splitlines()


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return main()


def test_every_stage_leaves_its_log(trained: Path) -> None:
    assert {line.split()[0] for line in _lines(trained)} == {"data", "judge", "vae", "gate", "clip", "unet", "export"}


def test_what_it_writes_draws_in_plain_diffusers(trained: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(trained / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a fox", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 128, 128) and torch.isfinite(picture).all()


def test_finished_stages_are_not_done_again_unless_asked(trained: Path) -> None:
    before = (trained / "vae.pt").read_bytes()
    lines = len(_lines(trained))
    Training(TOY, trained, trained / "model").run(("data", "vae"))
    assert (trained / "vae.pt").read_bytes() == before and len(_lines(trained)) == lines
    Training(TOY, trained, trained / "model").run(("vae",), again=True)
    assert (trained / "vae.pt").read_bytes() != before


def test_the_command_stops_at_a_gate_that_is_not_met_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "TOY", replace(TOY, floor=0.95))
    assert _command(monkeypatch, "all", "--toy", "--work", tmp_path) == RunError.exit_code != 0
    told = capsys.readouterr().err
    assert told.startswith("error: below 0.95: judge on drawings: species ") and told.count("\n") == 1
    assert (tmp_path / "judge.unmet.pt").exists() and not list(tmp_path.glob("vae*"))
    assert f"command python -m storyadapter.demo.training.train all --toy --work {tmp_path}" in _lines(tmp_path)[0]
    assert _lines(tmp_path)[-1].startswith("gate    what judge on drawings  species ")

    assert _command(monkeypatch, "vae", "--toy", "--work", tmp_path) == InputError.exit_code
    assert capsys.readouterr().err == f"error: vae needs judge, which isn't finished in {tmp_path}: run it first\n"

    before = torch.load(tmp_path / "judge.unmet.pt")["judge"]
    no_time = Budget(steps=1, batch=1, rate=1, seconds=1e-9)
    monkeypatch.setattr(train, "TOY", replace(TOY, judge=no_time))
    assert _command(monkeypatch, "judge", "data", "--toy", "--work", tmp_path) == 0
    after = torch.load(tmp_path / "judge.pt")["judge"]
    assert not (tmp_path / "judge.unmet.pt").exists() and all(torch.equal(after[k], before[k]) for k in before)


def test_latents_have_unit_deviation_under_the_scaling_factor(training: Training) -> None:
    latents = training._latents(training.sets["world"][0])
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)
    assert latents.mean((0, 2, 3)).abs().max() < 0.02


def test_whitening_changes_no_picture(training: Training) -> None:
    vae, x = training.networks["vae"], torch.rand(2, 3, 128, 128) * 2 - 1
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


def test_the_loop_finds_a_minimum_and_keeps_the_average_of_the_last_weights() -> None:
    def fit(average: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        seen = []

        def losses() -> dict[str, torch.Tensor]:
            seen.append(network.weight.detach().clone())
            return {"error": ((network(torch.eye(4)).diagonal() - torch.arange(4.0)) ** 2).mean()}

        budget = Budget(steps=600, batch=1, rate=0.05, average=average)
        optimize("fit", losses, [network], budget, lambda *_, **__: None, half=False)
        assert (network(torch.eye(4)).diagonal() - torch.arange(4.0)).abs().max() < 0.1
        return network.weight.detach(), [*seen[1:], network.weight.detach()]

    last, path = fit(average=0)
    averaged, same_path = fit(average=0.9)
    assert torch.equal(path[-2], same_path[-2])
    expected = path[0]
    for n, weight in enumerate(path[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(averaged, last)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    network = torch.nn.Linear(2, 2)

    def losses() -> dict[str, torch.Tensor]:
        return {"bad": network.weight.sum() * float("nan")}

    with pytest.raises(RunError, match="fit: loss at step 1 is not finite"):
        optimize("fit", losses, [network], Budget(1, 1, 0.1), lambda *_, **__: None, half=False)
