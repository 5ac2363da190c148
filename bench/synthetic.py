"""A whole model of seeded random weights, made on its device in seconds: what sizes, times and memory depend on.

The weights are scaled by what each layer sums over, and the ends of residual branches are damped, so that activations
neither vanish nor come near fp16's limit over 70 transformer layers, and pictures lie about in -1 to 1. Prompts and
references matter in it: a path that forgets one draws other pictures.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from storyadapter.checkpoint import AdapterLayer, IPAdapterWeights
from storyadapter.checkpoint.controlnets import residuals
from storyadapter.checkpoint.ip_adapter import cross_attentions
from storyadapter.checkpoint.outline import Outline
from storyadapter.checkpoint.paths import LoraSpec
from storyadapter.checkpoint.tokenizer_files import load_tokenizer
from storyadapter.demo.shipped import MODEL
from storyadapter.method import constants
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.model.contract import ControlGeometry, Geometry, LayerWidth, controlnet_name
from storyadapter.model.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SyntheticModel:
    """One model's configurations: what differs from the defaults of the libraries' own configuration classes."""

    name: str  # as typed after `--synthetic-weights`
    unet: dict[str, Any]  # of diffusers' `UNet2DConditionModel`
    vae: dict[str, Any]  # of diffusers' `AutoencoderKL`
    text_encoder: dict[str, Any]  # of transformers' `CLIPTextConfig`
    text_encoder_2: dict[str, Any]
    image_encoder: dict[str, Any]  # of transformers' `CLIPVisionConfig`
    reference_vae: dict[str, Any] = field(default_factory=dict)  # of diffusers' `AutoencoderTiny`

    @property
    def geometry(self) -> Geometry:
        """What `Checkpoint.geometry` would be for files of these configurations."""
        unet, depths = self.unet, self.unet["transformer_layers_per_block"][1:]  # the first level has no attention
        layers = [(2 * unet["layers_per_block"] + 1) * depth for depth in depths]  # of a level, downwards and upwards
        layers[-1] += depths[-1]  # in the middle
        levels = zip(unet["block_out_channels"][1:], layers, unet["attention_head_dim"][1:], strict=True)
        return Geometry(
            widths=tuple(LayerWidth(*level) for level in levels),
            time_embedding=4 * unet["block_out_channels"][0],
            text_width=self.text_encoder["hidden_size"],
            text_width_2=self.text_encoder_2["hidden_size"],
            pooled_width=self.text_encoder_2["projection_dim"],
            image_embedding_width=self.image_encoder["projection_dim"],
            sample_size=unet["sample_size"],
            guidance_embedding=unet.get("time_cond_proj_dim", 0),
        )

    @property
    def controlnet(self) -> dict[str, Any]:
        """Of diffusers' `ControlNetModel`, as large as the UNet's encoder."""
        return {name: value for name, value in self.unet.items() if name not in ("up_block_types", "sample_size")}

    @property
    def control_geometry(self) -> ControlGeometry:
        """What `Checkpoint.geometry` would have for such a ControlNet."""
        unet, depths = self.unet, self.unet["transformer_layers_per_block"][1:]
        layers = [unet["layers_per_block"] * depth for depth in depths]
        layers[-1] += depths[-1]  # in the middle
        levels = zip(unet["block_out_channels"][1:], layers, unet["attention_head_dim"][1:], strict=True)
        widths = tuple(LayerWidth(*level) for level in levels)
        return ControlGeometry(widths, 4 * unet["block_out_channels"][0], residuals(self.controlnet))


_UNET_CONFIG: Final[dict[str, Any]] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
_VAE_CONFIG: Final[dict[str, Any]] = {
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
        **_UNET_CONFIG,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE_CONFIG, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    text_encoder=_clip(768, 12, 12, 768, "quick_gelu", vocab_size=49408),
    text_encoder_2=_clip(1280, 32, 20, 1280, "gelu", vocab_size=49408),
    image_encoder=_clip(1664, 48, 16, 1280, "gelu", intermediate_size=8192, patch_size=14),
)

TOY: Final = SyntheticModel(
    name="toy",
    unet={
        **_UNET_CONFIG,
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
        **_VAE_CONFIG,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "sample_size": 64,
        "norm_num_groups": 8,
    },
    text_encoder=_clip(32, 2, 1, 32, "quick_gelu", vocab_size=1000),
    text_encoder_2=_clip(32, 2, 1, 32, "gelu", vocab_size=1000),
    image_encoder=_clip(32, 2, 1, 32, "gelu", patch_size=32),
)

# the same with UNets that take the guidance as an embedding, as latent-consistency/lcm-sdxl does
SDXL_LCM, TOY_LCM = (
    replace(model, name=f"{model.name}-lcm", unet={**model.unet, "time_cond_proj_dim": width})
    for model, width in ((SDXL, 256), (TOY, 16))
)

MODELS: Final = {model.name: model for model in (SDXL, TOY, SDXL_LCM, TOY_LCM)}

# With a network that knows nothing of its input, this is the prediction under which a sampler's state keeps its size:
# each step turns it towards the prediction instead of dividing by what little signal there is at first.
PREDICTION_TYPE: Final = "v_prediction"

# How much smaller than its layer's input a residual branch's output is.
_DAMPING: Final = 0.25
_BRANCH_ENDS: Final = (".conv2", ".to_out.0", ".ff.net.2", ".proj_out", ".out_proj", ".fc2")
_CONTROL_ENDS: Final = ("controlnet_down_blocks.", "controlnet_mid_block")  # damped alike, by the beginning
# Others that are not scaled by their fan-in alone, by the end of their name.
_SCALES: Final[Mapping[str, float]] = {
    "attn2.to_k": 1.75,  # attention looks at few tokens, as in a trained model, instead of at their mean
    "attn2.to_v": 2.0,
    "to_k_ip": 1.75,
    "to_v_ip": 8.0,  # so that pictures tell a missing reference, or half of λ
    "add_embedding.linear_2": 0.25,  # prompts shift a prediction, they don't replace it
    "post_quant_conv": 0.13025,  # the VAE's latents are larger by the inverse of its scaling factor
    "decoder.conv_out": 0.6,
}
_BIAS: Final = 0.05
_NORM_SPREAD: Final = 0.1

# in the order of their seeds, so that each can be made alone
_PARTS: Final = {
    "unet": UNet2DConditionModel,
    "ip_adapter": IPAdapterWeights,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "reference_vae": AutoencoderTiny,
    "controlnet": ControlNetModel,  # the last, as there may be several
}


class SyntheticCheckpoint:
    """A model of random weights with the methods of `storyadapter.checkpoint.Checkpoint` (`ModelParts`, and more).

    The same model, seed and kind of device give the same weights in every precision, up to rounding.

    Args:
        model: sizes, one of `MODELS`.
        device: where weights are made; "meta" makes none.
        seed: of all weights.
        controlnets: how many it has.
        reference_vae: whether it has one.
    """

    def __init__(
        self,
        model: SyntheticModel,
        device: torch.device,
        seed: int = 0,
        controlnets: int = 0,
        reference_vae: bool = False,
    ) -> None:
        self.model = model
        self.device = device
        self.seed = seed
        self.controlnets = controlnets
        self.reference_vae = reference_vae
        self.loras: tuple[LoraSpec, ...] = ()
        self.rewrites: Mapping[str, Callable[[nn.Module], None]] = {}
        self.sampling = ModelSampling(prediction_type=PREDICTION_TYPE)

    def rewritten(self, rewrites: Mapping[str, Callable[[nn.Module], None]]) -> "SyntheticCheckpoint":
        """The same model, of which these networks are rewritten when they are made."""
        other = copy(self)
        other.rewrites = rewrites
        return other

    @property
    def geometry(self) -> Geometry:
        controls = (self.model.control_geometry,) * self.controlnets
        return replace(self.model.geometry, controls=controls, reference_vae=self.reference_vae)

    @property
    def files_by_component(self) -> dict[str, tuple[Path, ...]]:
        """What the weights depend on: this code; the component's name tells the rest."""
        name = f"synthetic {self.model.name}, seed {self.seed}, {self.device.type}"
        name += f", {self.controlnets} ControlNets" if self.controlnets else ""
        name += ", reference VAE" if self.reference_vae else ""
        return {name: (Path(__file__),)}

    @property
    def configuration(self) -> Mapping[str, Mapping[str, Any]]:
        without = {"ip_adapter", "controlnet"} | (set() if self.reference_vae else {"reference_vae"})
        own = {part: getattr(self.model, part) for part in _PARTS if part not in without}
        return own | {controlnet_name(index): self.model.controlnet for index in range(self.controlnets)}

    @property
    def label(self) -> str:
        """For people."""
        controlled = f" and {self.controlnets} ControlNet{'s' * (self.controlnets > 1)}" if self.controlnets else ""
        return f"{self.model.name} with random weights (seed {self.seed}){controlled}"

    def load(self, part: str, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        """A network in `dtype` on `device`, or else the checkpoint's; each ControlNet has weights of its own."""
        index = 0
        if part.startswith("controlnet_"):
            part, index = "controlnet", int(part.rpartition("_")[2])
        sizes = getattr(self.model, part)
        if part in ("unet", "vae", "reference_vae", "controlnet"):
            options = sizes
        else:  # transformers' attention through PyTorch's own, as for models loaded from files
            config = self._vision_config if part == "image_encoder" else self._text_config
            options = {"config": config(attn_implementation="sdpa", **sizes)}
        with init_empty_weights(include_buffers=False):
            network = _PARTS[part](**options).eval()
        generator = self._generator(part, index)
        for prefix, module in network.named_modules():
            for name, empty in list(module.named_parameters(recurse=False)):
                # in fp32 first, so that every precision rounds the same numbers
                weight = torch.empty(empty.shape, device=self.device)
                _fill(weight, prefix, name, module, generator)
                module.register_parameter(name, nn.Parameter(weight.to(dtype), requires_grad=False))
        return nn.Module.to(network, device or self.device)

    def load_ip_adapter(self, dtype: torch.dtype, device: torch.device | None = None) -> IPAdapterWeights:
        """The IP-Adapter of this UNet."""
        generator = self._generator("ip_adapter")
        width = self.model.unet["cross_attention_dim"]
        embedding = self.geometry.image_embedding_width

        def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
            values = torch.empty(shape, device=self.device)
            return values.normal_(mean, std, generator=generator).to(device, dtype)

        def projection(channels: int, kind: str) -> Tensor:
            return normal(channels, width, std=_SCALES[kind] * width**-0.5)

        tokens = constants.TOKENS_PER_IMAGE * width
        with init_empty_weights():
            unet = UNet2DConditionModel(**self.model.unet)
        return IPAdapterWeights(
            projection_weight=normal(tokens, embedding, std=embedding**-0.5),
            projection_bias=normal(tokens, std=_BIAS),
            norm_weight=normal(width, std=_NORM_SPREAD, mean=1.0),
            norm_bias=normal(width, std=_BIAS),
            layers=tuple(
                AdapterLayer(layer.module, projection(layer.channels, "to_k_ip"), projection(layer.channels, "to_v_ip"))
                for layer in cross_attentions(Outline.of(unet))
            ),
        )

    def load_tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """The demo model's: they know fewer words than these text encoders."""
        return load_tokenizer(MODEL / "tokenizer"), load_tokenizer(MODEL / "tokenizer_2")

    def _text_config(self, **sizes: Any) -> CLIPTextConfig:
        first, _ = self.load_tokenizers()
        ids = {"bos_token_id": first.ids("")[0], "eos_token_id": first.end}
        return CLIPTextConfig(max_position_embeddings=constants.TEXT_TOKENS, **ids, **sizes)

    def _vision_config(self, **sizes: Any) -> CLIPVisionConfig:
        return CLIPVisionConfig(image_size=constants.CLIP_PIXELS, **sizes)

    def _generator(self, part: str, index: int = 0) -> torch.Generator | None:
        if self.device.type == "meta":
            return None
        return torch.Generator(self.device).manual_seed(self.seed * 100 + list(_PARTS).index(part) + index)


@torch.no_grad()
def _fill(weight: Tensor, prefix: str, name: str, module: nn.Module, generator: torch.Generator | None) -> None:
    if name == "bias":
        weight.normal_(std=_BIAS, generator=generator)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        weight.normal_(1.0, _NORM_SPREAD, generator=generator)
    elif isinstance(module, nn.Embedding) or weight.ndim == 1:
        weight.normal_(generator=generator)
    else:
        scale = _DAMPING if prefix.endswith(_BRANCH_ENDS) or prefix.startswith(_CONTROL_ENDS) else 1.0
        scale *= next((factor for end, factor in _SCALES.items() if prefix.endswith(end)), 1.0)
        weight.normal_(std=scale / math.sqrt(math.prod(weight.shape[1:])), generator=generator)
