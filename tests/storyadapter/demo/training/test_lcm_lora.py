"""The distillation runs at toy size, and its file is a LoRA that fits the shipped model and changes what it draws."""

import sys
from pathlib import Path

import pytest
import torch

from storyadapter.checkpoint import Checkpoint, CheckpointPaths, LoraSpec
from storyadapter.demo.shipped import LCM_LORA, MODEL
from storyadapter.demo.training.lcm_lora import Distillation, LowRank, main
from storyadapter.demo.training.networks import TINY, build


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lcm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lcm_lora.py", "--toy", "--work", str(work)])
        assert main() == 0
    return work / "lcm-lora.safetensors"


def test_it_leaves_a_log_and_a_lora_that_fits_the_model(lora: Path) -> None:
    lines = (lora.parent / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["run", "data", "data", "lcm", "lcm", "export"]
    plain, fused = (
        Checkpoint.open(CheckpointPaths.given(None, None, None, loras=loras)).load("unet", torch.float32)
        for loras in ((), (LoraSpec(lora),))
    )
    changed = {n for n, w in plain.named_parameters() if not torch.equal(w, fused.get_parameter(n))}
    layers = {n for n, w in plain.named_parameters() if w.ndim > 1}
    assert len(changed) > 0.9 * len(layers) and changed <= layers


def test_the_one_that_ships_is_known_by_its_name() -> None:
    lora = LoraSpec.parse("demo-lcm:0.5")
    assert lora == LoraSpec(LCM_LORA, 0.5) and LCM_LORA.stat().st_size < 400_000
    Checkpoint.open(CheckpointPaths.given(None, None, None, loras=(lora,)))


@torch.no_grad()
def test_what_is_added_is_up_times_down_and_nothing_at_first() -> None:
    unet = build(TINY).unet
    lora = LowRank(unet, 3)
    assert all(torch.equal(weight, unet.get_parameter(name)) for name, weight in lora.added_to(unet).items())
    convolution = lora.names.index("down_blocks.0.resnets.0.conv1")
    lora.up[convolution].normal_()
    x = torch.randn(1, 32, 5, 5)
    layer = unet.down_blocks[0].resnets[0].conv1
    down, up = lora.down[convolution], lora.up[convolution]
    expected = layer(x) + torch.conv2d(torch.conv2d(x, down, padding=1), up)
    found = torch.conv2d(x, lora.added_to(unet)["down_blocks.0.resnets.0.conv1.weight"], layer.bias, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_file_holds_what_changes_the_layers_most() -> None:
    unet = build(TINY).unet
    lora = LowRank(unet, 3)
    name = "down_blocks.0.resnets.0.conv1"
    place = lora.names.index(name)
    for number, up in enumerate(lora.up):
        up.normal_(std=1.0 if number == place else 1e-4)
    whole, few = lora.tensors(unet, 10**9), lora.tensors(unet, 3 * (32 + 9 * 32))
    assert len(whole) == 2 * len(lora.names)
    assert set(few) == {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"}
    down, up = (few[f"unet.{name}.lora_{side}.weight"].float() for side in "AB")
    assert down.shape == (3, 32, 3, 3) and up.shape == (32, 3, 1, 1)
    expected = lora.up[place].flatten(1) @ lora.down[place].flatten(1)
    torch.testing.assert_close(up.flatten(1) @ down.flatten(1), expected, rtol=1e-2, atol=1e-2)


def test_a_student_that_is_right_already_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher whose noise is that of one picture, the student's picture is the same on both sides of a step."""
    from storyadapter.demo.training.batched import BatchedMethod
    from storyadapter.demo.training.dataset import WorldSize
    from storyadapter.demo.training.rows import RowDraw
    from storyadapter.demo.vocabulary import TRAITS

    world, method = WorldSize(1, 2, 2), BatchedMethod(MODEL, "cpu")
    pictures = torch.randn(1, 4, 16, 16).expand(4, -1, -1, -1)
    tokens, labels = torch.full((4, 2, 2, 77), 5), torch.zeros(4, len(TRAITS), dtype=torch.int64)
    rows_of = RowDraw(world, 6, pictures, torch.randn(4, 2, 128), tokens, tokens[:2, 0], labels, free=0)
    losses = Distillation(method, LowRank(method.unet, 2), rows_of, tokens[0, 0], 50)

    def noise(self: Distillation, weights: object, x: torch.Tensor, step: torch.Tensor, *_: object) -> torch.Tensor:
        return (x - self._at(self.signal, step) * pictures[:1]) / self._at(self.spread, step)

    monkeypatch.setattr(Distillation, "_noise", noise)
    assert float(losses()["consistency"]) < 2e-3
    monkeypatch.setattr(Distillation, "_noise", lambda *args: noise(*args) + 1)
    assert float(losses()["consistency"]) > 2e-2
