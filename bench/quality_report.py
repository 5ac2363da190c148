"""From drawn stories to a table: what the judge reads off the pictures of every iteration, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from storyadapter.bench.measures import (
    Estimate,
    accuracy,
    agreement,
    all_right,
    bootstrap,
    bootstrap_pairs,
    consistency,
    difference,
)
from storyadapter.demo.held_out import PROMPTED
from storyadapter.demo.vocabulary import IDENTITY_TRAITS, TRAITS

COLUMNS = list(TRAITS)
IDENTITY_COLUMNS = [COLUMNS.index(name) for name in IDENTITY_TRAITS]
PROMPT_COLUMNS = [COLUMNS.index(name) for name in PROMPTED]


@dataclass(frozen=True)
class IterationQuality:
    """Measures of one iteration."""

    consistency: Estimate
    fidelity: Estimate  # species, place and action all as prompted
    by_prompt: Mapping[str, Estimate]  # each of PROMPTED alone
    by_trait: Mapping[str, float]  # consistency of each identity trait
    diversity: Estimate  # how often frames of different stories disagree


@dataclass(frozen=True)
class Quality:
    """Measures of a set of stories. `own` and `control`: how well frames drawn with the story's own references, and
    with another story's, agree with the identity of the story's own last iteration."""

    iterations: tuple[IterationQuality, ...]
    chance: float  # consistency of frames with independent, evenly drawn identities
    own: Estimate
    control: Estimate

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Markdown: one row per iteration."""
        lines = ["| iteration | consistency | fidelity | species | action | place | diversity |", "|" + " --- |" * 7]
        for n, row in enumerate(self.iterations):
            cells = [row.consistency, row.fidelity, *(row.by_prompt[name] for name in PROMPTED), row.diversity]
            lines.append(f"| {n} | " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    def holds(self) -> tuple[bool, bool]:
        """The method's claim: consistency rose (intervals apart); fidelity didn't fall (intervals overlap)."""
        first, last = self.iterations[0], self.iterations[-1]
        return first.consistency.high < last.consistency.low, last.fidelity.high >= first.fidelity.low


def measure(labels: np.ndarray, control: np.ndarray, truth: np.ndarray) -> Quality:
    """Measure drawn stories.

    Args:
        labels: what the judge read, [iterations, stories, repeats, frames, traits] in the order of `COLUMNS`.
        control: the last iteration drawn with the next story's references, [stories, repeats, frames, traits].
        truth: of `PROMPTED`, [stories, frames, 3].
    """
    rows = []
    for read in labels:
        identity, prompted = read[..., IDENTITY_COLUMNS], read[..., PROMPT_COLUMNS]
        right = accuracy(prompted, truth)
        rows.append(
            IterationQuality(
                consistency=bootstrap(consistency(identity)),
                fidelity=bootstrap(all_right(prompted, truth)),
                by_prompt={name: bootstrap(right[:, n]) for n, name in enumerate(PROMPTED)},
                by_trait={
                    name: float(consistency(identity[..., n : n + 1]).mean()) for n, name in enumerate(IDENTITY_TRAITS)
                },
                diversity=bootstrap_pairs(difference(identity)),
            )
        )
    last = labels[-1][..., IDENTITY_COLUMNS]
    before = labels[-2][..., IDENTITY_COLUMNS]
    return Quality(
        iterations=tuple(rows),
        chance=float(np.mean([1 / len(values) for values in IDENTITY_TRAITS.values()])),
        own=bootstrap(agreement(last, before)),
        control=bootstrap(agreement(control[..., IDENTITY_COLUMNS], before)),
    )
