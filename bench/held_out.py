"""Stories about characters that the demo model was never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from storyadapter.demo.training.characters import ACTIONS, SPECIES, Visible
from storyadapter.demo.training.dataset import split_visible
from storyadapter.demo.training.places import PLACES
from storyadapter.demo.training.scenes import ACTION_PHRASES, PLACE_PHRASES, character_phrase

PROMPTED = ("species", "action", "place")  # what the truth of a frame tells, in this order
FRAMES_AT_MOST = len(ACTIONS) * len(PLACES)  # of a story, as no two show the same


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
        species = SPECIES.index(self.character.species)
        return np.array([[species, ACTIONS.index(action), PLACES.index(place)] for action, place in self.scenes])


def held_out_stories(count: int, frames: int, seed: int = 0) -> list[HeldOutStory]:
    """The first `count` stories of an endless fixed list; frames of one story differ in action or place."""
    random = Random(seed)
    _, kinds = split_visible()
    order = random.sample(kinds, len(kinds))
    pairs = [(action, place) for action in ACTIONS for place in PLACES]
    return [HeldOutStory(order[n % len(order)], tuple(random.sample(pairs, frames))) for n in range(count)]
