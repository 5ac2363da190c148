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
}

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
    vae={
        **_VAE,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 1024,
        "force_upcast": True,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    text_encoder_2={
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    image_encoder={
        "hidden_size": 1664,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
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
        "force_upcast": True,
    },
    text_encoder={
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
    },
    text_encoder_2={
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 32,
        "hidden_act": "gelu",
    },
    image_encoder={
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "patch_size": 32,
        "projection_dim": 32,
        "hidden_act": "gelu",
    },
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
