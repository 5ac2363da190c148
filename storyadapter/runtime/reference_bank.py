"""The reference bank: keys and values of every picture of the iteration before, projected once per iteration."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from storyadapter.method import constants
from storyadapter.model.contract import image_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.jobs import References
from storyadapter.runtime.streams import upload

_ROWS_KEPT: Final = 4  # a lone story needs two; what else is used in turn is projected again, which is cheap

# λ, and the references: None for the unconditional row; no λ: no references
BankKey = tuple[float | None, str | None]


@dataclass(frozen=True, eq=False)
class BankRow:
    """What UNet rows attend to besides their text: `kv` by width C, [L, 2, R, C] in the denoiser's dtype, λ folded into
    the values; an empty `kv` is one token whose key and value are zero, which adds exactly nothing."""

    kv: dict[int, Tensor]

    @property
    def length(self) -> int:
        """Tokens: R, or 1 where there are no references."""
        return next(iter(self.kv.values())).shape[2] if self.kv else 1


NO_REFERENCES: Final = BankRow({})


class ReferenceBank:
    """Projected references, on the device; keeps the rows that were used last.

    The published method repeats the unconditional tokens once per reference; attention over N identical copies equals
    attention over one, so that row holds only the 4 tokens of one all-zero embedding.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._kept: OrderedDict[BankKey, BankRow] = OrderedDict()

    def take(self, asked: Sequence[tuple[float | None, References | None]]) -> list[BankRow]:
        """The rows for some λ and references; (λ, None) is the unconditional row, (None, None) the one without any."""
        rows = [self._row(scale, references) for scale, references in asked]
        while len(self._kept) > max(_ROWS_KEPT, len(asked)):
            self._kept.popitem(last=False)
        return rows

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()

    def _row(self, scale: float | None, references: References | None) -> BankRow:
        if scale is None:
            return NO_REFERENCES
        key = (scale, references.key if references else None)
        if key not in self._kept:
            width = self._networks.geometry.image_embedding_width
            embeddings = references.embeddings if references else torch.zeros(1, width)
            self._kept[key] = project(self._networks, embeddings, scale)
        self._kept.move_to_end(key)
        return self._kept[key]


def project(networks: Networks, embeddings: Tensor, scale: float) -> BankRow:
    """The bank row of some pictures, in one call.

    Args:
        embeddings: [N, width] CLIP embeddings in order, any float type, on any device; R is 4·N.
        scale: λ.
    """
    inputs = {
        "image_embedding": upload(embeddings.to(networks.dtype("reference_projection")), networks.device),
        "scale": torch.full((1,), scale, device=networks.device),
    }
    outputs = networks["reference_projection"](inputs)
    return BankRow(
        {width.channels: outputs[image_kv_name(width.channels)].clone() for width in networks.geometry.widths}
    )


def reference_tokens(references: int) -> int:
    """R of so many references."""
    return constants.TOKENS_PER_IMAGE * references
