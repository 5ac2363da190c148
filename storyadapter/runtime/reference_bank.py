"""The reference bank: keys and values of every picture of the iteration before, projected once per iteration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter.method import constants
from storyadapter.model.contract import image_kv_name
from storyadapter.model.networks import Networks

UNCONDITIONAL_ROW, STORY_ROW = 0, 1


@dataclass(frozen=True, eq=False)
class ReferenceBank:
    """The reference inputs of every UNet call of one iteration.

    ref_kv: by width C, [L, G, 2, R, C] in the engine's dtype, λ folded into the values, zeros behind a row's length;
    ref_length: [G] int32. G is 2: the unconditional row and the story. The tensors stay where they are when a bank is
    filled again, so that CUDA graphs that read them stay right.
    """

    ref_kv: dict[int, Tensor]
    ref_length: Tensor

    @classmethod
    def empty(cls, networks: Networks, references: int = 1) -> "ReferenceBank":
        """A bank with room for so many references that holds none; see `clear`."""
        tokens = constants.TOKENS_PER_IMAGE * references
        options = {"dtype": networks.dtype("denoiser"), "device": networks.device}
        return cls(
            ref_kv={
                w.channels: torch.zeros(w.layers, 2, 2, tokens, w.channels, **options) for w in networks.geometry.widths
            },
            ref_length=torch.ones(2, dtype=torch.int32, device=networks.device),
        )

    @classmethod
    def project(cls, networks: Networks, image_embedding: Tensor, scale: float) -> "ReferenceBank":
        """A bank of these references; see `fill`."""
        bank = cls.empty(networks, len(image_embedding))
        bank.fill(networks, image_embedding, scale)
        return bank

    def clear(self) -> None:
        """No references: in both rows one token whose key and value are zero, which adds exactly nothing."""
        for kv in self.ref_kv.values():
            kv.zero_()
        self.ref_length.fill_(1)

    def fill(self, networks: Networks, image_embedding: Tensor, scale: float) -> None:
        """Project all references of an iteration, and the unconditional one, in one call.

        The published method repeats the unconditional tokens once per reference; attention over N identical copies
        equals attention over one, so that row holds only the 4 tokens of one all-zero embedding. Nothing is copied
        from the host, so nothing waits for the device.

        Args:
            image_embedding: [N, width] CLIP embeddings in story order, engine's dtype; R is 4·N.
            scale: λ.
        """
        embeddings = torch.cat((image_embedding, torch.zeros_like(image_embedding[:1])))
        outputs = networks["reference_projection"](
            {"image_embedding": embeddings, "scale": torch.full((1,), scale, device=networks.device)}
        )
        tokens = constants.TOKENS_PER_IMAGE * len(image_embedding)
        for channels, kv in self.ref_kv.items():
            image_kv = outputs[image_kv_name(channels)]
            kv[:, UNCONDITIONAL_ROW, :, : constants.TOKENS_PER_IMAGE] = image_kv[:, :, tokens:]
            kv[:, UNCONDITIONAL_ROW, :, constants.TOKENS_PER_IMAGE :] = 0
            kv[:, STORY_ROW] = image_kv[:, :, :tokens]
        self.ref_length[UNCONDITIONAL_ROW].fill_(constants.TOKENS_PER_IMAGE)
        self.ref_length[STORY_ROW].fill_(tokens)


def bank_rows(frames: int, guided: bool, device: torch.device) -> Tensor:
    """[B] int32: the bank row of each UNet row, unconditional rows first; made on the device."""
    rows = torch.full((frames * (1 + guided),), STORY_ROW, dtype=torch.int32, device=device)
    if guided:
        rows[:frames].fill_(UNCONDITIONAL_ROW)
    return rows
