"""Compiled code serves any weights of its kind: another checkpoint, a LoRA, another scale; compared at first use."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._inductor import config

from storyadapter import Checkpoint
from storyadapter.checkpoint import LoraSpec
from storyadapter.demo.training.networks import TINY, write_random_model
from storyadapter.engine.identity import model_weights
from storyadapter.engine.inductor.networks import open_inductor
from storyadapter.engine.opening import open_networks
from storyadapter.engine.store import EngineStore
from storyadapter.method.errors import EngineBuildError, EngineMismatchError
from storyadapter.model.networks import Networks
from tests.engine.inductor.test_inductor import RANGES, engine_folder, pictures, psnr

COMPARING = "the engine's code with other weights: comparing with eager"
# in a fused product, in the stacked projections, in one whose rows are rearranged, and in a text encoder
LAYERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
}


@pytest.fixture(scope="module")
def store(tiny_inductor_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "store"
    shutil.copytree(tiny_inductor_dir, folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Another model of the same kind."""
    folder = tmp_path_factory.mktemp("other-model")
    write_random_model(folder, seed=1, config=TINY)
    paths = {"image_encoder": folder / "image_encoder", "ip_adapter": folder / "ip-adapter.safetensors"}
    return Checkpoint.open(base_model=folder, **paths)


@pytest.fixture(scope="module")
def lora(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    networks = {
        "unet": checkpoint.load("unet", torch.float32),
        "text_encoder_2": checkpoint.load("text_encoder_2", torch.float32),
    }
    tensors = {}
    generator = torch.Generator().manual_seed(7)
    for name in sorted(LAYERS):
        network, _, layer = name.partition(".")
        modules = dict(networks[network].named_modules())
        rows, columns = modules[layer].weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, path)
    return path


def with_lora(checkpoint: Checkpoint, path: Path, scale: float) -> Checkpoint:
    return Checkpoint.open(replace(checkpoint.paths, loras=(LoraSpec(path, scale),)))


def opened(checkpoint: Checkpoint, store: Path) -> tuple[Networks, set[str]]:
    """The networks and what was told, where nothing can be compiled: there is no compiler."""
    stages: set[str] = set()
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        networks = open_networks(
            checkpoint,
            backend="inductor",
            ranges=RANGES,
            engine_dir=store,
            on_stage=lambda network, what: stages.add(what) if network else None,
        )
    return networks, stages


def packages(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*.pt2")}


def test_another_checkpoint_and_a_lora_at_two_scales_need_no_build(
    store: Path, checkpoint: Checkpoint, other: Checkpoint, lora: Path
) -> None:
    before, drawn = packages(store), []
    for model in (other, with_lora(checkpoint, lora, 0.5), with_lora(checkpoint, lora, 1.5)):
        networks, stages = opened(model, store)
        assert stages == {COMPARING}
        drawn.append(pictures(networks, model))
        expected = pictures(open_networks(model, device="cpu"), model)
        assert min(psnr(one, same) for one, same in zip(drawn[-1], expected, strict=True)) >= 50
        _, stages = opened(model, store)
        assert stages == {"loading engine"}
    # the comparison sees a difference: the weights decide what is drawn
    plain = pictures(opened(checkpoint, store)[0], checkpoint)
    assert max(psnr(drawn[2][0], one[0]) for one in (drawn[0], drawn[1], plain)) < 45
    assert packages(store) == before
    ((engine,), _) = EngineStore(store).scan()
    scales = {use.model.rpartition(":")[2] for use in engine.uses.values() if "style" in use.model}
    assert len(engine.uses) == 4 and scales == {"0.5", "1.5"}


@pytest.mark.parametrize("damage", [b"", b'{"model": "x", "details": {}}', b'{"model": "x"}', None])
def test_without_a_whole_record_code_is_compared_again(store: Path, checkpoint: Checkpoint, damage: bytes) -> None:
    record = engine_folder(store) / "uses" / f"{model_weights(checkpoint).key}.json"
    record.unlink() if damage is None else record.write_bytes(damage)
    assert opened(checkpoint, store)[1] == {COMPARING}
    errors = json.loads(record.read_bytes())["details"]["relative_error_against_eager"]
    assert len(errors) == 7 and max(errors.values()) < 1e-4
    assert opened(checkpoint, store)[1] == {"loading engine"}


@pytest.fixture(scope="module")
def rescaled(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same weights, but the VAE's configuration says another factor, which stands in the code."""
    folder = tmp_path_factory.mktemp("rescaled") / "model"
    shutil.copytree(tiny_model_dir, folder)
    path = folder / "vae" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "scaling_factor": settings["scaling_factor"] * 1.1, "_note": "same kind"}))
    paths = {"image_encoder": folder / "image_encoder", "ip_adapter": folder / "ip-adapter.safetensors"}
    return Checkpoint.open(base_model=folder, **paths)


def test_what_stands_in_the_code_is_in_the_key(store: Path, rescaled: Checkpoint) -> None:
    with pytest.raises(EngineMismatchError, match=r"differs: configuration of the networks is \w{8} in"):
        opened(rescaled, store)


def test_code_that_computes_something_else_is_refused(store: Path, rescaled: Checkpoint) -> None:
    ((engine,), _) = EngineStore(store).scan()
    with pytest.raises(EngineBuildError, match=r"^vae_decoder: output image differs from eager by .* expected at most"):
        open_inductor(engine, rescaled, engine.identity.numerics, torch.device("cpu"), lambda network, what: None)
