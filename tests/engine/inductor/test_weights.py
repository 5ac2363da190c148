"""What packages read, made without modules: bit by bit what the modules that were compiled have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storyadapter.checkpoint import Checkpoint, LoraSpec
from storyadapter.engine.inductor import weights as weights_module
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.weights import read_weights, remember_recipes
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from tests.control_models import write_controlnet
from tests.reference_vaes import write_reference_vae
from tests.storyadapter.checkpoint.original_layout import single_file
from tests.storyadapter.checkpoint.spoil import tiny_paths

CPU = torch.device("cpu")
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["folder with more networks", "file with LoRA"])
def model(request: pytest.FixtureRequest, tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    if request.param == "folder with more networks":
        controlnet = write_controlnet(tiny_model_dir, tmp_path / "control")
        vae = write_reference_vae(tmp_path / "tiny")
        return Checkpoint.open(tiny_paths(tiny_model_dir, controlnets=(controlnet,), reference_vae=vae))
    names = ("unet", "text_encoder", "text_encoder_2", "vae")
    save_file(single_file(*(checkpoint.load(name, torch.float32) for name in names)), tmp_path / "m")
    shape = checkpoint.load("unet", torch.float32).get_submodule(LAYER).weight.shape
    lora = {
        f"unet.{LAYER}.lora_A.weight": torch.ones(2, shape[1]),
        f"unet.{LAYER}.lora_B.weight": torch.ones(shape[0], 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    loras = (LoraSpec(tmp_path / "lora.safetensors", 0.5),)
    return Checkpoint.open(
        tiny_paths(tiny_model_dir, base_model=tmp_path / "m", base_config=tiny_model_dir, loras=loras)
    )


@pytest.mark.parametrize("numerics", [Numerics("fp32"), Numerics.of("fp16", vae_decoder="fp32")], ids=str)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_weights_are_those_of_the_modules(
    model: Checkpoint, numerics: Numerics, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU as well, whose packages read other layouts: what is done to the tensors is the same on any device."""
    device = torch.device(kind)
    if kind == "cuda":
        pytest.importorskip("triton")
        load, adapter = Checkpoint.load_tensors, Checkpoint.load_ip_adapter
        monkeypatch.setattr(Checkpoint, "load_tensors", lambda self, name, dtype, device: load(self, name, dtype, CPU))
        monkeypatch.setattr(Checkpoint, "load_ip_adapter", lambda self, dtype, device: adapter(self, dtype, CPU))
    for again in (False, True):
        found = dict(read_weights(model, numerics, device))
        expected = {
            name: prepare(module, device) for name, module in iterate_modules(model, numerics, grca, device=CPU)
        }
        assert found.keys() == expected.keys(), again
        for name, weights in expected.items():
            assert [*found[name]] == [*weights]
            for key, value in weights.items():
                assert found[name][key].stride() == value.stride() and found[name][key].dtype == value.dtype, (
                    name,
                    key,
                )
                assert torch.equal(found[name][key], value), (name, key)


def test_what_a_build_found_out_a_run_need_not(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpoint.open(tiny_paths(tiny_model_dir))
    remember_recipes(model, Numerics("fp32"), CPU)
    monkeypatch.delattr(weights_module, "record")
    assert len(dict(read_weights(model, Numerics("fp32"), CPU))) == 7
    with pytest.raises(NameError):
        dict(read_weights(model, Numerics("fp16"), CPU))
