"""Draws the UNet's training rows on the device: targets, captions, references, λ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from storyadapter.demo.dataset import WorldSize
from storyadapter.demo.scenes import IDENTITY_TRAITS

SLOTS = 8  # references of one training row, at most


@dataclass(frozen=True)
class Rows:
    latents: Tensor  # [B, 4, h, w]
    tokens: Tensor  # [B, 2, 77]
    references: Tensor  # image embeddings [B, SLOTS, D]
    mask: Tensor  # [B, 1, 1, 4 · SLOTS]
    scale: Tensor  # λ [B, 1, 1]


class RowDraw:
    """Draws training rows of the UNet: a target picture, a caption of it, and references that resemble its character.

    References are pictures of characters of the same visible kind, chosen with odds that rise with the number of
    identity traits shared with the target. One number per row moves between "all show the target's character" and
    "nobody does, but for most traits the plurality has the target's value": what iteration 1 meets.
    """

    def __init__(
        self,
        world: WorldSize,
        batch: int,
        latents: Tensor,
        embeddings: Tensor,
        tokens: Tensor,
        dropped: Tensor,
        labels: Tensor,
    ) -> None:
        self._world, self._batch = world, batch
        self._latents, self._embeddings, self._tokens, self._dropped = latents, embeddings, tokens, dropped
        self._noise = 0.15 * embeddings.std()
        identity = labels[:, -len(IDENTITY_TRAITS) :].view(world.visible, world.identities, world.views, -1)
        identity = identity[:, :, 0]
        self._shared = (identity[:, :, None] == identity[:, None]).sum(-1)  # traits: [visible, identity, identity]

    def __call__(self) -> Rows:
        world, n, device = self._world, self._batch, self._latents.device

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (n, *shape), device=device)

        def part(*shape: int) -> Tensor:
            return torch.rand(n, *shape, device=device)

        kind, who = whole(world.visible), whole(world.identities)
        target = (kind * world.identities + who) * world.views + whole(world.views)
        count = 1 + whole(SLOTS)
        likeness = 0.6 + 2.4 * part(1, 1) + 3.0 * (count < 3)[:, None, None]
        chance = -torch.log(-torch.log(part(SLOTS, world.identities).clamp(1e-7, 1 - 1e-7)))
        likely = likeness * self._shared[kind, who][:, None] + chance
        shown = (kind[:, None] * world.identities + likely.argmax(-1)) * world.views + whole(world.views, SLOTS)
        slots = torch.arange(SLOTS, device=device)
        guests = (part(1) < 0.2) & (slots >= (0.6 * count).ceil()[:, None])  # other characters of the story
        shown = torch.where(guests, whole(len(self._latents), SLOTS), shown)
        references = self._embeddings[shown, whole(2, SLOTS)]
        references = references + self._noise * part(1, 1) * torch.randn_like(references)
        free = part() < 0.12  # the unconditional rows of guidance
        tokens = self._tokens[target, whole(self._tokens.shape[1])]
        tokens = torch.where(free[:, None, None], self._dropped[whole(2)], tokens)
        scale = torch.where(part() < 0.25, 0.0, 0.3 + 0.7 * part() ** 2)
        return Rows(
            latents=self._latents[target],
            tokens=tokens,
            references=torch.where(free[:, None, None], 0.0, references),
            mask=(slots < count[:, None]).repeat_interleave(4, 1)[:, None, None],
            scale=scale[:, None, None],
        )
