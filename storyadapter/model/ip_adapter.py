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
    """The adapter's keys and values of one cross-attention layer of width C, for image tokens of width X (2048).

    Attributes:
        module: name of the layer in the UNet, such as "down_blocks.1.attentions.0.transformer_blocks.0.attn2".
        to_k: [C, X], weight of a linear layer without bias.
        to_v: [C, X], likewise.
    """

    module: str
    to_k: Tensor
    to_v: Tensor


@dataclass(frozen=True)
class IPAdapterWeights:
    """The plain IP-Adapter (arXiv 2308.06721): image embedding of width D -> 4 tokens of width X -> keys and values.

    Attributes:
        projection_weight: [4·X, D], linear layer on the image embedding.
        projection_bias: [4·X].
        norm_weight: [X], layer norm of each token.
        norm_bias: [X].
        layers: in the order of the UNet's `attn_processors`: down, up, mid.
    """

    projection_weight: Tensor
    projection_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    layers: tuple[AdapterLayer, ...]
