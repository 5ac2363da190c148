"""What people give instead of the right file or folder: a level too high or too low, and any bytes as weights."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from storyadapter.checkpoint import Checkpoint, CheckpointPaths, LoraSpec
from storyadapter.checkpoint.paths import find
from storyadapter.method.errors import CheckpointError
from tests.permissions import without_permission
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.spoil import refuses, tiny_paths


@pytest.fixture
def models(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with the model, its image encoder and its adapter in folders of their own."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_model_dir, folder / "sdxl", ignore=shutil.ignore_patterns("image_encoder", "ip-adapter*"))
    shutil.copytree(tiny_model_dir / "image_encoder", folder / "clip" / "image_encoder")
    (folder / "adapters").mkdir()
    shutil.copy(tiny_model_dir / "ip-adapter.safetensors", folder / "adapters" / "ip-adapter_sdxl.safetensors")
    return folder


def right(models: Path, **typed: Path | str) -> CheckpointPaths:
    adapter = models / "adapters" / "ip-adapter_sdxl.safetensors"
    paths = {"base_model": models / "sdxl", "image_encoder": models / "clip" / "image_encoder", "ip_adapter": adapter}
    return CheckpointPaths(**(paths | typed))


def test_a_folder_too_high(models: Path) -> None:
    Checkpoint.open(right(models))
    refuses(
        f"--image-encoder {models} has no config.json; give {models}/clip/image_encoder",
        right(models, image_encoder=models),
    )
    refuses(f"--base-model {models} has no unet in it; give {models}/sdxl", right(models, base_model=models))
    refuses(f"--vae {models}/sdxl has no config.json; give {models}/sdxl/vae", right(models, vae=models / "sdxl"))
    refuses(
        f"--ip-adapter {models} is a folder; expected a .safetensors or .bin file; give "
        f"{models}/adapters/ip-adapter_sdxl.safetensors",
        right(models, ip_adapter=models),
    )
    refuses(
        f"--lora {models}/adapters has no pytorch_lora_weights.safetensors; give {models}/adapters/ip-adapter_sdxl.",
        right(models, loras=(LoraSpec(models / "adapters"),)),
    )
    shutil.copytree(models / "clip" / "image_encoder", models / "other")
    refuses(
        f"has no config.json; give one of {models}/other, {models}/clip/image_encoder",
        right(models, image_encoder=models),
    )


def test_a_folder_too_low(models: Path) -> None:
    unet = models / "sdxl" / "unet"
    refuses(f"--base-model {unet} has no unet in it; give {models}/sdxl", right(models, base_model=unet))


def test_a_folder_that_has_nothing_below(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(
        f"--image-encoder {tmp_path}/empty has no config.json; expected the folder of a model, which has one",
        right(models, image_encoder=tmp_path / "empty"),
    )


@pytest.mark.parametrize("field", ["base_model", "image_encoder", "ip_adapter", "vae", "lora"])
def test_the_systems_own_reason_for_every_path_that_is_typed(tiny_model_dir: Path, tmp_path: Path, field: str) -> None:
    def typed(path: Path) -> CheckpointPaths:
        return tiny_paths(tiny_model_dir, **({"loras": (LoraSpec(path),)} if field == "lora" else {field: path}))

    option = f"--{field.replace('_', '-')}"
    loop, dangling = tmp_path / "loop", tmp_path / "dangling"
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "gone")
    for path, told in (
        (tmp_path / "gone", ": there is no such file or folder"),
        (Path("~no-such-user/model"), ": there is no such file or folder"),
        (loop, " can't be read: Too many levels of symbolic links"),
        (dangling, f" is a link to {tmp_path}/gone, which isn't there"),
        (tmp_path / ("x" * 300), " can't be read: File name too long"),
    ):
        refuses(f"{option} {path}{told}", typed(path))
    with without_permission(tmp_path), raises_typed(CheckpointError, f"{option} .*/a can't be read: Permission denied"):
        find(field, tmp_path / "a")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "unet"])
def test_the_systems_own_reason_for_files_in_a_model(models: Path, name: str) -> None:
    path = models / "sdxl" / name
    shutil.move(path, models / "elsewhere")
    path.symlink_to(path)
    refuses(f"{path} can't be read: Too many levels of symbolic links", right(models))


def test_a_configuration_that_never_ends(models: Path) -> None:
    path = models / "sdxl" / "unet" / "config.json"
    path.unlink()
    os.mkfifo(path)
    refuses("unet/config.json is no regular file; expected a configuration in JSON", right(models))


WEIGHTS = {
    "unet": "sdxl/unet/diffusion_pytorch_model.safetensors",
    "vae": "sdxl/vae/diffusion_pytorch_model.safetensors",
    "text encoder": "sdxl/text_encoder/model.safetensors",
    "image encoder": "clip/image_encoder/model.safetensors",
    "adapter": "adapters/ip-adapter_sdxl.safetensors",
    "LoRA": "lora.safetensors",
    "single file": "model.safetensors",
    "VAE file": "vae.safetensors",
}
NAMES = st.sampled_from(
    ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.output_blocks.x.y", "first_stage_model.a")
    + (
        "conditioner.embedders.0.transformer.a",
        "conditioner.embedders.1.model.transformer.resblocks.x.attn.in_proj_weight",
    )
    + ("decoder.up.x.block.0", "encoder.mid.attn_1.q.weight", "image_proj.latents", "image_proj.proj.0.weight")
    + ("ip_adapter.1.to_k_ip.weight", "ip_adapter.1.lora", "lora_unet_mid_block_resnets_0_conv1.lora_down.weight")
    + (
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight",
        "lora_te1_x.alpha",
        "unet.conv_in.lora_A.weight",
        "conv_in.diff",
    )
    + ("conv_in.weight", "quant_conv.weight", "text_model.embeddings.position_ids", "vision_model.a", "", "é\u202e")
)
SHAPES = st.lists(st.sampled_from((0, 1, 2, 32)), max_size=4)
TENSORS = st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from((torch.float32, torch.int8))), max_size=6)


@settings(
    max_examples=25,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(role=st.sampled_from(tuple(WEIGHTS)), content=st.one_of(st.binary(max_size=100), TENSORS), pickled=st.booleans())
def test_any_bytes_as_a_weight_file(models: Path, role: str, content: bytes | dict, pickled: bool) -> None:
    """Refused in one line, whatever the file has: bytes, or tensors under names that the readers look at."""
    path = models / WEIGHTS[role]
    whole = path.read_bytes() if path.exists() else None
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in content.items()}
        torch.save(tensors, path) if pickled else save_file(tensors, path)
    typed = {
        "LoRA": {"loras": (LoraSpec(path),)},
        "single file": {"base_model": path, "base_config": models / "sdxl"},
        "VAE file": {"vae": path},
    }
    try:
        Checkpoint.open(right(models, **typed.get(role, {})))
    except CheckpointError as error:
        assert "\n" not in str(error) and not str(error).endswith(":")
    else:  # a LoRA of one layer can be whole
        assert role == "LoRA"
    finally:
        if whole is not None:
            path.write_bytes(whole)


def test_a_whole_lora_is_not_refused_by_its_name(models: Path, tmp_path: Path) -> None:
    weight = load_file(models / WEIGHTS["unet"])["conv_in.weight"]
    for name in ("a.SAFETENSORS", "a.bin", "a.pt"):
        save_file({"unet.conv_in.diff": torch.zeros_like(weight)}, tmp_path / name)
        Checkpoint.open(right(models, loras=(LoraSpec(tmp_path / name),)))


def test_a_pointer_in_place_of_a_networks_weights(models: Path) -> None:
    (models / WEIGHTS["unet"]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    refuses("diffusion_pytorch_model.safetensors holds no weights: it is a git-lfs pointer", right(models))
    index = models / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    (models / WEIGHTS["unet"]).rename(index.with_name("a.safetensors"))
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    refuses("a.safetensors holds no weights: it is a git-lfs pointer", right(models))
