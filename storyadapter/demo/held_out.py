"""Stories about characters that the demo model was never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np

from storyadapter.demo.vocabulary import (
    ACTION_PHRASES,
    PLACE_PHRASES,
    TRAITS,
    VISIBLE_TRAITS,
    Visible,
    all_visible,
    character_phrase,
)

PROMPTED = ("species", "action", "place")  # what the truth of a frame tells, in this order
HELD_OUT_PER_SPECIES = 4


def split_visible() -> tuple[list[Visible], list[Visible]]:
    """Kinds of characters for training, and those held out: the same few of every species, never trained on."""
    random = Random(20240601)
    held_out = []
    for species in VISIBLE_TRAITS["species"]:
        kinds = [kind for kind in all_visible() if kind.species == species]
        held_out += random.sample(kinds, HELD_OUT_PER_SPECIES)
    return [kind for kind in all_visible() if kind not in held_out], held_out


@dataclass(frozen=True)
class HeldOutStory:
    """Prompts of one story and what its frames must show."""

    character: Visible
    scenes: tuple[tuple[str, str], ...]  # action and place of each frame

    @property
    def prompts(self) -> list[str]:
        who = character_phrase(self.character)
        return [f"{who} is {ACTION_PHRASES[action][0]} {PLACE_PHRASES[place][0]}" for action, place in self.scenes]

    @property
    def truth(self) -> np.ndarray:
        """Labels of `PROMPTED` per frame, int64 [frames, 3]."""
        columns = [TRAITS[name].index for name in PROMPTED]
        shown = ((self.character.species, *scene) for scene in self.scenes)
        return np.array([[column(value) for column, value in zip(columns, row, strict=True)] for row in shown])


def held_out_stories(count: int, frames: int, seed: int = 0) -> list[HeldOutStory]:
    """The first `count` stories of an endless fixed list; frames of one story differ in action or place."""
    random = Random(seed)
    _, kinds = split_visible()
    order = random.sample(kinds, len(kinds))
    pairs = list(product(VISIBLE_TRAITS["action"], VISIBLE_TRAITS["place"]))
    return [HeldOutStory(order[n % len(order)], tuple(random.sample(pairs, frames))) for n in range(count)]
