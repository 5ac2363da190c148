"""The demo model's networks: SDXL's topology at a small size, built and written in the published formats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from storyadapter.demo.training.tokenizer import START, vocabulary, write_tokenizer
from storyadapter.method.constants import TOKENS_PER_IMAGE

SDXL_LATENT_SCALE = 0.13025  # the VAE's `scaling_factor` in published SDXL; the demo VAE is trained to need the same


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of a small SDXL. Every field has the meaning of the published configuration files."""

    unet_channels: tuple[int, int, int] = (64, 96, 96)
    unet_layers: int = 1
    transformer_layers: tuple[int, int, int] = (1, 1, 1)  # of the three levels; the first has no attention
    head_size: int = 32
    time_ids_width: int = 32
    text_width: int = 64
    text_layers: int = 2
    text_width_2: int = 64
    text_layers_2: int = 3
    embedding_width: int = 128  # of the CLIP pair: pooled text and image embedding
    vision_width: int = 96
    vision_layers: int = 3
    vision_patch: int = 16
    vae_channels: tuple[int, int, int, int] = (24, 32, 48, 48)
    vae_layers: int = 1
    pixels: int = 128

    @property
    def cross_width(self) -> int:
        """Width of the cross-attention input: both encoders' hidden states side by side."""
        return self.text_width + self.text_width_2


TINY = DemoConfig(
    unet_channels=(32, 32, 64),
    transformer_layers=(1, 1, 1),
    time_ids_width=8,
    text_width=32,
    text_layers=2,
    text_width_2=32,
    text_layers_2=2,
    embedding_width=32,
    vision_width=32,
    vision_layers=2,
    vision_patch=32,
    vae_channels=(8, 8, 16, 16),
    pixels=64,
)


@dataclass(frozen=True)
class DemoModel:
    """The networks of one demo model, in fp32 on one device until they are written."""

    config: DemoConfig
    words: tuple[str, ...]  # that are single tokens
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    adapter: Adapter

    def networks(self) -> dict[str, Any]:
        """Folder name (for the adapter: file stem) to network."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
            "image_encoder": self.image_encoder,
            "ip-adapter": self.adapter,
        }


class Adapter(nn.Module):
    """IP-Adapter: the image projection and one pair of key and value matrices per cross-attention layer.

    The parameters are named as in the published file (`image_proj.*`, `ip_adapter.<i>.to_k_ip.weight`, where i is
    the index of the layer in `unet.attn_processors`). Source: IP-Adapter (arXiv 2308.06721), section 3.2.2.
    """

    def __init__(self, unet: UNet2DConditionModel, embedding_width: int) -> None:
        super().__init__()
        width, self.embedding_width = unet.config.cross_attention_dim, embedding_width
        self.image_proj = nn.ModuleDict(
            {"proj": nn.Linear(embedding_width, TOKENS_PER_IMAGE * width), "norm": nn.LayerNorm(width)}
        )
        self.ip_adapter = nn.ModuleDict()
        for index, name in enumerate(unet.attn_processors):
            if name.endswith("attn2.processor"):
                channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
                pair = {part: nn.Linear(width, channels, bias=False) for part in ("to_k_ip", "to_v_ip")}
                self.ip_adapter[str(index)] = nn.ModuleDict(pair)

    def tokens(self, embedding: Tensor) -> Tensor:
        """Project image embeddings [..., D] to reference tokens [..., 4, cross-attention width]."""
        proj, norm = self.image_proj["proj"], self.image_proj["norm"]
        return norm(proj(embedding).unflatten(-1, (TOKENS_PER_IMAGE, -1)))


def build(config: DemoConfig = DemoConfig(), words: Sequence[str] = ()) -> DemoModel:
    """Make untrained networks (the libraries' own initial weights, from torch's global generator).

    Args:
        config: the sizes.
        words: pieces that the tokenizers know as single tokens; the vocabulary's size follows from them.
    """
    ids, _ = vocabulary(words)
    text = {
        "vocab_size": len(ids),
        "max_position_embeddings": 77,
        "bos_token_id": ids[START],
        "eos_token_id": len(ids) - 1,
        "pad_token_id": len(ids) - 1,
        "projection_dim": config.embedding_width,
    }
    unet = UNet2DConditionModel(
        sample_size=config.pixels // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=config.unet_channels,
        layers_per_block=config.unet_layers,
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=tuple(c // config.head_size for c in config.unet_channels),  # SDXL: number of heads
        cross_attention_dim=config.cross_width,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.time_ids_width,
        projection_class_embeddings_input_dim=6 * config.time_ids_width + config.embedding_width,
    )
    return DemoModel(
        config=config,
        words=tuple(words),
        unet=unet,
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=config.vae_channels,
            layers_per_block=config.vae_layers,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=config.pixels,
            scaling_factor=SDXL_LATENT_SCALE,
            force_upcast=False,
        ),
        text_encoder=CLIPTextModel(_text_config(config.text_width, config.text_layers, "quick_gelu", text)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text_config(config.text_width_2, config.text_layers_2, "gelu", text)
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.vision_width,
                intermediate_size=4 * config.vision_width,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_width // 32,
                image_size=224,
                patch_size=config.vision_patch,
                projection_dim=config.embedding_width,
                hidden_act="gelu",
            )
        ),
        adapter=Adapter(unet, config.embedding_width),
    )


def _text_config(width: int, layers: int, activation: str, shared: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        hidden_act=activation,
        **shared,
    )


def write_model(model: DemoModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the model as a diffusers SDXL folder with `image_encoder/` and `ip-adapter.safetensors` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in model.networks().items():
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in network.state_dict().items()}
        if isinstance(network, Adapter):
            save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})
        elif isinstance(network, UNet2DConditionModel | AutoencoderKL):
            copy = type(network).from_config(network.config)
            nn.Module.to(copy, dtype)  # diffusers' own `to` logs an empty warning
            copy.load_state_dict(state)
            copy.save_pretrained(folder / name, safe_serialization=True)
        else:
            network.config.architectures = [type(network).__name__]
            network.config.dtype = dtype
            network.config.save_pretrained(folder / name)
            save_file(_published_keys(name, state), folder / name / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder / "tokenizer", model.words, pad_token="<|endoftext|>")
    write_tokenizer(folder / "tokenizer_2", model.words, pad_token="!")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", MODEL_INDEX)


def _published_keys(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Newer transformers dropped the prefix that published files of the first text encoder have."""
    if name != "text_encoder":
        return state
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def write_random_model(
    folder: Path,
    seed: int = 0,
    config: DemoConfig = DemoConfig(),
    dtype: torch.dtype = torch.float32,
    words: Sequence[str] = (),
) -> None:
    """Write a whole model of seeded random weights whose activations have sane sizes.

    References matter visibly in it: the adapter's values are as large as the text's.

    Args:
        folder: made if it is missing.
        seed: the same seed writes the same weights.
        config: sizes; `TINY` is the smallest that has every part.
        dtype: of the weights on disk.
        words: that the tokenizers know as single tokens; others are read letter by letter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, words)
        for network in model.networks().values():
            randomize(network)
        write_model(model, folder, dtype)


@torch.no_grad()
def randomize(network: nn.Module) -> None:
    """Draw all weights anew, from the default generator, so that activations keep their size."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = math.prod(module.weight.shape[1:])
            module.weight.normal_(std=1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.normal_(1, 0.1)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.normal_(std=0.05)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


SCHEDULER: dict[str, object] = {  # SDXL's own; the method brings its constants itself
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
MODEL_INDEX: dict[str, object] = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.35.0",
    "force_zeros_for_empty_prompt": False,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
