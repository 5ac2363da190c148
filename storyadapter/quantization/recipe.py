"""Which layers of a network are quantized, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any, Final

from torch import nn

from storyadapter.model.numerics import NumberFormat

_UNIT: Final = 16  # of channels in and out that kernels take


@dataclass(frozen=True)
class Recipe:
    """The number format, and the layers that stay in half precision.

    Attributes:
        number_format: of weights, with a scale per output channel, and activations, with one per tensor.
        statistic: of a layer's inputs over all of calibration, on which its scale rests: "max", the largest magnitude.
        smoothing: SmoothQuant's α, how much of what is hard to round moves from a linear layer's activations to its
            weight; 0 for none.
        kept: patterns of the names of layers that aren't quantized.
    """

    number_format: NumberFormat = "fp8"
    statistic: str = "max"
    smoothing: float = 0.0
    kept: tuple[str, ...] = ()

    def layers(self, network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers to be quantized, by name: linear layers and 3×3 convolutions whose widths kernels take."""
        parts = ((name, part) for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))
        return {
            name: part
            for name, part in parts
            if _fits(part) and not any(fnmatch(name, pattern) for pattern in self.kept)
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `Recipe.from_dict` reads it back."""
        return {**asdict(self), "kept": list(self.kept)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        return cls(**{**data, "kept": tuple(data["kept"])})


def _fits(part: nn.Linear | nn.Conv2d) -> bool:
    if isinstance(part, nn.Linear):
        widths = (part.in_features, part.out_features)
    else:
        if part.kernel_size != (3, 3) or part.padding != (1, 1) or part.groups != 1 or part.dilation != (1, 1):
            return False
        widths = (part.in_channels, part.out_channels)
    return all(width % _UNIT == 0 for width in widths)


# Source of what is kept: NVIDIA's FP8 recipe for SDXL (modelopt's diffusers example, MLPerf Inference).
_KEPT: Final = (
    *("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj", "*.conv_shortcut"),
    *("up_blocks.2.resnets.2.conv1", "up_blocks.2.resnets.2.conv2"),
)
FP8: Final = Recipe(kept=_KEPT)
# α: NVIDIA's for SDXL; with less, or none, the demo model didn't hold the rule for lossy modes (docs/backends.md)
INT8: Final = Recipe("int8", smoothing=0.8, kept=_KEPT)
RECIPES: Final[Mapping[NumberFormat, Recipe]] = {recipe.number_format: recipe for recipe in (FP8, INT8)}
# Of the VAE's decoder the residual blocks' and upsamplers' convolutions, which take most of its time. What is kept are
# its ends, by which every pixel goes, and the attention over all pixels.
VAE_FP8: Final = Recipe(kept=("post_quant_conv", "decoder.conv_in", "decoder.conv_out", "*.attentions.*"))
_OF_NETWORKS: Final = {"denoiser": RECIPES, "vae_decoder": {VAE_FP8.number_format: VAE_FP8}}


def recipe_of(network: str, number_format: NumberFormat) -> Recipe:
    """How a network of the contract is quantized. Raises KeyError: it isn't, to this format."""
    return _OF_NETWORKS[network][number_format]
