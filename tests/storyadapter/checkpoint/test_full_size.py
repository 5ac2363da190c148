"""SDXL at its full size, from headers alone: the sizes that are read, and that nothing big is touched for it."""

from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.contract import Geometry, LayerWidth
from storyadapter.demo.networks import MODEL_INDEX, Adapter
from storyadapter.demo.vocabulary import write_tokenizer
from tests.storyadapter.checkpoint.original_layout import single_file
from tests.storyadapter.checkpoint.spoil import write_header_only

# The published configurations: https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0
SDXL = Geometry(
    widths=(LayerWidth(640, 10, 10), LayerWidth(1280, 60, 20)),
    time_embedding=1280,
    text_width=768,
    text_width_2=1280,
    pooled_width=1280,
    image_embedding_width=1280,
    sample_size=128,
)


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

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        text = {"vocab_size": 49408, "max_position_embeddings": 77}
        return {
            "unet": unet,
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=1024,
                scaling_factor=0.13025,
                force_upcast=True,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **text
                )
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                    hidden_act="gelu",
                    **text,
                )
            ),
            "image_encoder": CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=1664,
                    intermediate_size=8192,
                    num_hidden_layers=48,
                    num_attention_heads=16,
                    patch_size=14,
                    projection_dim=1280,
                    hidden_act="gelu",
                )
            ),
            "ip-adapter": Adapter(unet, 1280),
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
    assert checkpoint.geometry == SDXL
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
    assert Checkpoint.open(paths).geometry == SDXL
