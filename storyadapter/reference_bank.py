"""The reference bank: keys and values of every picture of the iteration before, projected once per iteration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter import method
from storyadapter.contract import image_kv_name
from storyadapter.networks import Networks

UNCONDITIONAL_ROW, STORY_ROW = 0, 1


@dataclass(frozen=True)
class ReferenceBank:
    """The reference inputs of every UNet call of one iteration.

    ref_kv: by width C, [L, G, 2, R, C] in the engine's dtype, λ folded into the values, zeros behind a row's length;
    ref_length: [G] int32. G is 2: the unconditional row and the story.
    """

    ref_kv: dict[int, Tensor]
    ref_length: Tensor

    @classmethod
    def empty(cls, networks: Networks) -> "ReferenceBank":
        """No references: in both rows one token whose key and value are zero, which adds exactly nothing."""
        options = {"dtype": networks.dtype, "device": networks.device}
        return cls(
            ref_kv={
                w.channels: torch.zeros(w.layers, 2, 2, 1, w.channels, **options) for w in networks.geometry.widths
            },
            ref_length=torch.ones(2, dtype=torch.int32, device=networks.device),
        )

    @classmethod
    def project(cls, networks: Networks, image_embedding: Tensor, scale: float) -> "ReferenceBank":
        """Project all references of an iteration, and the unconditional one, in one call.

        The published method repeats the unconditional tokens once per reference; attention over N identical copies
        equals attention over one, so that row holds only the 4 tokens of one all-zero embedding.

        Args:
            image_embedding: [N, width] CLIP embeddings in story order, engine's dtype.
            scale: λ.
        """
        embeddings = torch.cat((image_embedding, torch.zeros_like(image_embedding[:1])))
        outputs = networks.reference_projection(
            {"image_embedding": embeddings, "scale": torch.tensor([scale], device=networks.device)}
        )
        tokens = method.TOKENS_PER_IMAGE * len(image_embedding)
        ref_kv = {}
        for width in networks.geometry.widths:
            image_kv = outputs[image_kv_name(width.channels)]
            bank = image_kv.new_zeros(width.layers, 2, 2, tokens, width.channels)
            bank[:, UNCONDITIONAL_ROW, :, : method.TOKENS_PER_IMAGE] = image_kv[:, :, tokens:]
            bank[:, STORY_ROW] = image_kv[:, :, :tokens]
            ref_kv[width.channels] = bank
        lengths = torch.tensor([method.TOKENS_PER_IMAGE, tokens], dtype=torch.int32, device=networks.device)
        return cls(ref_kv, lengths)

    def rows(self, frames: int, guided: bool) -> Tensor:
        """[B] int32: the bank row of each UNet row, unconditional rows first."""
        rows = [UNCONDITIONAL_ROW] * (frames if guided else 0) + [STORY_ROW] * frames
        return torch.tensor(rows, dtype=torch.int32, device=self.ref_length.device)
