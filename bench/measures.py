"""Measures of drawn stories, computed from traits read off the pictures, with intervals by bootstrap over stories.

Labels are integers [stories, repeats, frames, traits]; a repeat is the same story with another seed. Every measure
gives one number per story (its repeats averaged), so that stories, the independent unit, are what is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over stories with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def consistency(labels: np.ndarray) -> np.ndarray:
    """How often two frames of one story agree in a trait: mean over pairs of frames and traits, float [stories].

    1: the same character in every frame; `chance` where every frame draws its own.
    """
    frames = labels.shape[2]
    if frames < 2:
        raise ValueError(f"consistency needs stories of 2 frames or more, got {frames}")
    same = labels[:, :, :, None] == labels[:, :, None, :]
    pairs = same.mean(-1).sum((2, 3)) - frames  # a frame agrees with itself
    return (pairs / (frames * (frames - 1))).mean(1)


def accuracy(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often a frame shows what its prompt says, float [stories, traits].

    Args:
        labels: [stories, repeats, frames, traits].
        truth: [stories, frames, traits].
    """
    return (labels == truth[:, None]).mean((1, 2))


def all_right(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often a frame shows everything that its prompt says, float [stories]; arguments as for `accuracy`."""
    return (labels == truth[:, None]).all(-1).mean((1, 2))


def difference(labels: np.ndarray) -> np.ndarray:
    """How often frames of two different stories disagree in a trait, float [stories, stories] (diagonal: nan).

    Falls to 0 for a model that draws one character for everything.
    """
    stories = labels.shape[0]
    odds = _frequencies(labels.reshape(stories, -1, labels.shape[-1]))
    agree = np.einsum("stv,rtv->sr", odds, odds) / labels.shape[-1]
    np.fill_diagonal(agree, np.nan)
    return 1 - agree


def agreement(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How often a frame of `labels` agrees in a trait with a frame of `others`, the same story drawn in another way:
    float [stories]. Both [stories, repeats, frames, traits]; repeats are compared one to one."""
    same = labels[:, :, :, None] == others[:, :, None, :]
    return same.mean((1, 2, 3, 4))


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean of one number per story, with the 2.5 % and 97.5 % points of the mean over resampled stories."""
    random = np.random.default_rng(seed)
    means = values[random.integers(len(values), size=(draws, len(values)))].mean(1)
    return Estimate(float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


def bootstrap_pairs(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """The same for one number per pair of stories [stories, stories]; a story with itself (nan) doesn't count."""
    random = np.random.default_rng(seed)
    means = []
    for at in random.integers(len(values), size=(draws, len(values))):
        if len(set(at)) > 1:
            means.append(np.nanmean(values[np.ix_(at, at)]))
    return Estimate(float(np.nanmean(values)), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


def _frequencies(labels: np.ndarray) -> np.ndarray:
    """Shares of values, [stories, n, traits] to [stories, traits, values]."""
    values = int(labels.max()) + 1
    return (labels[..., None] == np.arange(values)).mean(1)
