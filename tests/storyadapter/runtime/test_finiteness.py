"""Which network is named when a frame isn't finite, and what is advised."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyadapter import Checkpoint, RunPlan, Story
from storyadapter.api import open_checkpoint
from storyadapter.checkpoint import LoraSpec
from storyadapter.checkpoint.not_finite import explain_not_finite
from storyadapter.cli.options import option
from storyadapter.method.errors import RunError, spelled
from storyadapter.model.contract import NetworkSpec
from storyadapter.model.networks import Network, Networks
from storyadapter.model.numerics import Precision
from storyadapter.runtime.pipeline import StoryPipeline
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.spoil import tiny_paths
from tests.storyadapter.runtime.replaced import with_networks

PLAN = RunPlan(height=64, width=64, seed=3, steps=1, scales=(0.4,))


@dataclass
class Poisoned:
    """Gives a value that isn't finite in each row of its outputs."""

    network: Network

    @property
    def spec(self) -> NetworkSpec:
        return self.network.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = {name: value.clone() for name, value in self.network(inputs).items()}
        for value in outputs.values():
            value[..., 0] = torch.inf
        return outputs


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> StoryPipeline:
    return open_checkpoint(checkpoint, backend="eager")


def draw(networks: Networks, checkpoint: Checkpoint) -> None:
    for _ in StoryPipeline(networks, checkpoint.load_tokenizers()).run(Story(("a fox", "an owl"), style="none"), PLAN):
        pass


@pytest.mark.parametrize(
    ("network", "where"),
    [
        ("text_encoder", "iteration 0, frame 0: text encoder 1"),
        ("text_encoder_2", "iteration 0, frame 0: text encoder 2"),
        ("text_projection", "iteration 0, frame 0: the UNet's text projection"),
        ("image_encoder", "iteration 0, frame 0: the image encoder"),
        ("reference_projection", "iteration 1, frame 0: the IP-Adapter"),
        ("denoiser", "iteration 0, frame 0: the UNet"),
        ("vae_decoder", "iteration 0, frame 0: the VAE"),
    ],
)
def test_the_first_network_is_named(pipeline: StoryPipeline, checkpoint: Checkpoint, network: str, where: str) -> None:
    networks = with_networks(pipeline.networks, **{network: Poisoned(pipeline.networks[network])})
    with raises_typed(RunError, f"^{where} gave values that are not finite in fp32, though its weights are$"):
        draw(networks, checkpoint)


def explained(checkpoint: Checkpoint, network: str, precision: Precision = "fp32") -> tuple[str, str]:
    found, advice = explain_not_finite(checkpoint, network, precision)
    return spelled(found, option), spelled(advice, option)


def test_only_what_can_help_is_advised(checkpoint: Checkpoint) -> None:
    finite = ", though its weights are"
    assert explained(checkpoint, "denoiser") == (finite, "")
    assert explained(checkpoint, "denoiser", "fp16") == (finite, "try --precision bf16 or fp32, with another --out")
    assert explained(checkpoint, "denoiser", "bf16") == (finite, "try --precision fp32, with another --out")
    assert explained(checkpoint, "vae_decoder") == (finite, "")
    assert explained(checkpoint, "vae_decoder", "bf16") == (finite, "try --vae-precision fp32, with another --out")


def test_a_network_that_no_files_are_known_of(pipeline: StoryPipeline, checkpoint: Checkpoint) -> None:
    poisoned = with_networks(pipeline.networks, denoiser=Poisoned(pipeline.networks["denoiser"]))
    with raises_typed(RunError, "frame 0: the UNet gave values that are not finite in fp32$"):
        draw(replace(poisoned, explain_not_finite=None), checkpoint)


def lora(path: Path, value: float) -> Path:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    up, down = torch.ones(32, 1), torch.ones(1, 32)
    up[3] = value
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_lora_is_looked_at_first(tiny_model_dir: Path, tmp_path: Path, value: float) -> None:
    path = lora(tmp_path / "style.safetensors", value)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(path),)))
    bad = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight"
    expected = (", though its weights are", "try a smaller scale of --lora")
    if value != value:
        expected = (f": so is {bad} in {path}", "leave this --lora out")
    assert explained(checkpoint, "denoiser") == expected
    assert explained(checkpoint, "vae_decoder") == (", though its weights are", "")  # which no LoRA changes


@pytest.mark.parametrize(
    ("network", "file", "name"),
    [
        ("text_encoder_2", "text_encoder_2/model.safetensors", None),
        ("denoiser", "unet/diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("text_projection", "unet/diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("reference_projection", "ip-adapter.safetensors", "image_proj.norm.bias"),
    ],
)
def test_damaged_and_too_large_weights_are_named(model_dir: Path, network: str, file: str, name: str | None) -> None:
    tensors = load_file(model_dir / file)
    name = name or next(iter(tensors))
    for value, found, advice in (
        (1e6, f": {name} in {model_dir / file} is beyond the range of fp16", "try --precision bf16 or fp32, "),
        (float("nan"), f": so is {name} in {model_dir / file}", "the file is damaged, fetch it again"),
    ):
        tensors[name].view(-1)[0] = value
        save_file(tensors, model_dir / file, metadata={"format": "pt"})
        told, advised = explained(Checkpoint.open(tiny_paths(model_dir)), network, "fp16")
        assert told == found and advised.startswith(advice)
