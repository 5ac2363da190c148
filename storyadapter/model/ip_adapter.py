"""The weights of an IP-Adapter, as the reference projection and the cross-attention layers take them.

Imports nothing heavy, as those who only check a model's files need the types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterLayer:
    """The adapter's keys and values of one cross-attention layer of width C, for image tokens of width X (2048)."""

    module: str  # name of the layer in the UNet, such as "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    to_k: Tensor  # [C, X], weight of a linear layer without bias
    to_v: Tensor  # [C, X], likewise


@dataclass(frozen=True)
class IPAdapterWeights:
    """The plain IP-Adapter (arXiv 2308.06721): image embedding of width D -> 4 tokens of width X -> keys and values."""

    projection_weight: Tensor  # [4·X, D], linear layer on the image embedding
    projection_bias: Tensor  # [4·X]
    norm_weight: Tensor  # [X], layer norm of each token
    norm_bias: Tensor  # [X]
    layers: tuple[AdapterLayer, ...]  # in the order of the UNet's `attn_processors`: down, up, mid
