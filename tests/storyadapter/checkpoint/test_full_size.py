"""SDXL at its full size, from headers alone: the sizes that are read, and that nothing big is touched for it."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from storyadapter.bench.synthetic import SDXL
from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.demo.training.networks import MODEL_INDEX, Adapter
from storyadapter.demo.training.tokenizer import write_tokenizer
from tests.storyadapter.checkpoint.original_layout import single_file
from tests.storyadapter.checkpoint.spoil import write_header_only


def full_size_networks() -> dict[str, nn.Module]:
    """SDXL's networks, ViT-bigG and the IP-Adapter on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    end = {"eos_token_id": 2}  # as SDXL's own files say
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL.unet)
        return {
            "unet": unet,
            "vae": AutoencoderKL(**SDXL.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SDXL.text_encoder, **end)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL.text_encoder_2, **end)),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**SDXL.image_encoder)),
            "ip-adapter": Adapter(unet, SDXL.geometry.image_embedding_width),
        }


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return full_size_networks()


@pytest.fixture(scope="module")
def folder(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    folder = tmp_path_factory.mktemp("sdxl")
    for name, network in networks.items():
        tensors = {key: t.to(torch.float16) for key, t in network.state_dict().items()}
        if name == "ip-adapter":
            write_header_only(folder / "ip-adapter.safetensors", tensors)
            continue
        (folder / name).mkdir()
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        write_header_only(folder / name / f"{stem}.fp16.safetensors", tensors)
        if name in ("unet", "vae"):
            network.save_config(folder / name)
        else:
            network.config.save_pretrained(folder / name)
    for part in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / part, (), pad_token="!")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))
    return folder


def test_geometry_and_memory(folder: Path) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    checkpoint = Checkpoint.open(
        base_model=folder, image_encoder=folder / "image_encoder", ip_adapter=folder / "ip-adapter.safetensors"
    )
    assert checkpoint.geometry == SDXL.geometry
    declared = sum(path.stat().st_size for paths in checkpoint.files_by_component.values() for path in paths)
    assert declared > 10e9
    assert process.memory_info().rss - before < 0.05 * declared


def test_single_file(folder: Path, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    parts = (networks[name] for name in ("unet", "text_encoder", "text_encoder_2", "vae"))
    tensors = {name: t.to("meta", torch.float16) for name, t in single_file(*parts).items()}
    write_header_only(tmp_path / "sdxl.safetensors", tensors)
    paths = CheckpointPaths(
        base_model=tmp_path / "sdxl.safetensors",
        base_config=folder,
        image_encoder=folder / "image_encoder",
        ip_adapter=folder / "ip-adapter.safetensors",
    )
    assert Checkpoint.open(paths).geometry == SDXL.geometry
