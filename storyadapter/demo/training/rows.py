"""Draws the UNet's training rows on the device: targets, captions, references, λ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter.demo.training.dataset import WorldSize
from storyadapter.demo.vocabulary import IDENTITY_TRAITS

SLOTS = 8  # references of one training row, at most


@dataclass(frozen=True)
class Rows:
    latents: Tensor  # [B, 4, h, w]
    tokens: Tensor  # [B, 2, 77]
    references: Tensor  # image embeddings [B, SLOTS, D]
    mask: Tensor  # [B, 1, 1, 4 · SLOTS]
    scale: Tensor  # λ [B, 1, 1]


@dataclass
class RowDraw:
    """Draws training rows of the UNet: a target picture, a caption of it, and references that resemble its character.

    References are pictures of characters of the same visible kind, chosen with odds that rise with the number of
    identity traits shared with the target. One number per row moves between "all show the target's character" and
    "nobody does, but for most traits the plurality has the target's value": what iteration 1 meets.
    """

    world: WorldSize  # of P pictures
    batch: int
    latents: Tensor  # [P, 4, h, w]
    embeddings: Tensor  # of each picture and of its reconstruction [P, 2, D]
    tokens: Tensor  # captions [P, variants, 2, 77]
    dropped: Tensor  # what unconditional rows say [2, 2, 77]
    labels: Tensor  # [P, traits]
    free: float = 0.12  # share of unconditional rows

    def __post_init__(self) -> None:
        self._noise = 0.15 * self.embeddings.std()
        people = self.labels.unflatten(0, (-1, self.world.identities, self.world.views))[:, :, 0]
        identity = people[..., -len(IDENTITY_TRAITS) :]
        self._shared = (identity[:, :, None] == identity[:, None]).sum(-1)  # traits: [visible, identity, identity]

    def __call__(self) -> Rows:
        world, device = self.world, self.latents.device

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (self.batch, *shape), device=device)

        def part(*shape: int) -> Tensor:
            return torch.rand(self.batch, *shape, device=device)

        kind, who = whole(world.visible), whole(world.identities)
        target = (kind * world.identities + who) * world.views + whole(world.views)
        count = 1 + whole(SLOTS)
        likeness = 0.6 + 2.4 * part(1, 1) + 3.0 * (count < 3)[:, None, None]
        chance = -torch.log(-torch.log(part(SLOTS, world.identities).clamp(1e-7, 1 - 1e-7)))
        likely = likeness * self._shared[kind, who][:, None] + chance
        shown = (kind[:, None] * world.identities + likely.argmax(-1)) * world.views + whole(world.views, SLOTS)
        slots = torch.arange(SLOTS, device=device)
        guests = (part(1) < 0.2) & (slots >= (0.6 * count).ceil()[:, None])  # other characters of the story
        shown = torch.where(guests, whole(len(self.latents), SLOTS), shown)
        references = self.embeddings[shown, whole(2, SLOTS)]
        references = references + self._noise * part(1, 1) * torch.randn_like(references)
        free = part() < self.free  # the unconditional rows of guidance
        tokens = self.tokens[target, whole(self.tokens.shape[1])]
        tokens = torch.where(free[:, None, None], self.dropped[whole(2)], tokens)
        scale = torch.where(part() < 0.25, 0.0, 0.3 + 0.7 * part() ** 2)
        return Rows(
            latents=self.latents[target],
            tokens=tokens,
            references=torch.where(free[:, None, None], 0.0, references),
            mask=(slots < count[:, None]).repeat_interleave(4, 1)[:, None, None],
            scale=scale[:, None, None],
        )
