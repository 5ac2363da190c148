"""The sizes of the models of random weights, as data: SDXL as published, and a toy of the same structure."""

from dataclasses import dataclass
from typing import Any, Final

from storyadapter.model.contract import Geometry, LayerWidth


@dataclass(frozen=True)
class SyntheticModel:
    """One model's configurations: what differs from the defaults of the libraries' own configuration classes.

    Attributes:
        name: as typed after `--synthetic-weights`.
        unet, vae: of diffusers' `UNet2DConditionModel` and `AutoencoderKL`.
        text_encoder, text_encoder_2: of transformers' `CLIPTextConfig`.
        image_encoder: of transformers' `CLIPVisionConfig`.
        geometry: what `Checkpoint.geometry` would be for files of these configurations.
    """

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]
    image_encoder: dict[str, Any]
    geometry: Geometry


_UNET: Final[dict[str, Any]] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_VAE: Final[dict[str, Any]] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


def _clip(width: int, layers: int, heads: int, projection: int, activation: str, **others: Any) -> dict[str, Any]:
    """A CLIP encoder, whose MLPs are 4 times as wide unless `others` says else."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "projection_dim": projection, "hidden_act": activation} | others


# Sources: huggingface.co/stabilityai/stable-diffusion-xl-base-1.0 (unet, vae, text_encoder, text_encoder_2) and
# huggingface.co/h94/IP-Adapter, sdxl_models/image_encoder: the ViT-bigG whose embeddings `ip-adapter_sdxl` takes.
SDXL: Final = SyntheticModel(
    name="sdxl",
    unet={
        **_UNET,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    text_encoder=_clip(768, 12, 12, 768, "quick_gelu", vocab_size=49408),
    text_encoder_2=_clip(1280, 32, 20, 1280, "gelu", vocab_size=49408),
    image_encoder=_clip(1664, 48, 16, 1280, "gelu", intermediate_size=8192, patch_size=14),
    geometry=Geometry(
        widths=(LayerWidth(640, 10, 10), LayerWidth(1280, 60, 20)),
        time_embedding=1280,
        text_width=768,
        text_width_2=1280,
        pooled_width=1280,
        image_embedding_width=1280,
        sample_size=128,
    ),
)

TOY: Final = SyntheticModel(
    name="toy",
    unet={
        **_UNET,
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "norm_num_groups": 16,
    },
    vae={
        **_VAE,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 8,
    },
    text_encoder=_clip(32, 2, 1, 32, "quick_gelu", vocab_size=1000),
    text_encoder_2=_clip(32, 2, 1, 32, "gelu", vocab_size=1000),
    image_encoder=_clip(32, 2, 1, 32, "gelu", patch_size=32),
    geometry=Geometry(
        widths=(LayerWidth(32, 3, 1), LayerWidth(64, 4, 2)),
        time_embedding=128,
        text_width=32,
        text_width_2=32,
        pooled_width=32,
        image_embedding_width=32,
        sample_size=8,
    ),
)

MODELS: Final = {model.name: model for model in (SDXL, TOY)}
