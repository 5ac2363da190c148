"""The training pictures: which scenes there are, drawn by all cores into one file, and their captions and labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np

from storyadapter.demo.held_out import split_visible
from storyadapter.demo.training.painter import SIZE
from storyadapter.demo.training.scenes import Character, Scene, caption, draw, labels, random_identity
from storyadapter.demo.training.tokenizer import words_of
from storyadapter.demo.vocabulary import (
    ACTION_PHRASES,
    CHARACTER_PHRASES,
    PLACE_PHRASES,
    TRAITS,
    VISIBLE_TRAITS,
    Visible,
    all_visible,
)
from storyadapter.method.constants import NEGATIVE_PROMPT, STYLES

_STYLE_ODDS = {"none": 40, "realistic": 30, "comic": 15, "film": 15}
_CHUNK = 256


@dataclass(frozen=True)
class WorldSize:
    """How many pictures there are: `identities` characters for each visible kind, each in `views` scenes."""

    visible: int
    identities: int
    views: int

    @property
    def pictures(self) -> int:
        return self.visible * self.identities * self.views


def training_scenes(size: WorldSize, seed: int) -> list[Scene]:
    """Scenes in the order [visible, identity, view]."""
    kinds, _ = split_visible()
    return [
        scene for k in range(size.visible) for scene in _scenes_of(kinds[k], size.identities, size.views, (seed, k))
    ]


def mixed_scenes(count: int, seed: int, kinds: Sequence[Visible] | None = None) -> list[Scene]:
    """Independent scenes, each with its own character of one of the `kinds` (default: all)."""
    random = Random(seed)
    kinds = kinds or all_visible()
    return [_scenes_of(random.choice(kinds), 1, 1, (seed, n, 1))[0] for n in range(count)]


def _scenes_of(kind: Visible, identities: int, views: int, seed: tuple[int, ...]) -> list[Scene]:
    random = Random(repr(seed))
    scenes = []
    for _ in range(identities):
        character = Character(kind, random_identity(random))
        for _ in range(views):
            action, place = random.choice(VISIBLE_TRAITS["action"]), random.choice(VISIBLE_TRAITS["place"])
            scenes.append(Scene(character, action, place, random.randrange(2**32)))
    return scenes


def draw_all(scenes: Sequence[Scene], path: Path, workers: int | None = None) -> np.ndarray:
    """Draw scenes with all cores into an .npy file of uint8 [scenes, 128, 128, 3]; return it, mapped into memory."""
    unfinished = path.with_suffix(".part")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(len(scenes), SIZE, SIZE, 3)).flush()
    chunks = [(unfinished, start, scenes[start : start + _CHUNK]) for start in range(0, len(scenes), _CHUNK)]
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            _draw_chunk(chunk)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            list(pool.map(_draw_chunk, chunks))
    unfinished.replace(path)
    return np.load(path, mmap_mode="r")


def _draw_chunk(chunk: tuple[Path, int, Sequence[Scene]]) -> None:
    path, start, scenes = chunk
    pictures = np.lib.format.open_memmap(path, mode="r+")
    for n, scene in enumerate(scenes):
        pictures[start + n] = np.asarray(draw(scene))


def label_table(scenes: Iterable[Scene]) -> np.ndarray:
    """Labels of scenes, int64 [scenes, traits], the columns in the order of `TRAITS`."""
    return np.array([[found[name] for name in TRAITS] for found in map(labels, scenes)], dtype=np.int64)


def captions(scenes: Sequence[Scene], variants: int, seed: int) -> list[str]:
    """`variants` captions per scene in the order [scene, variant], as prompts of all the published styles."""
    random = Random(seed)
    styles = random.choices(list(_STYLE_ODDS), list(_STYLE_ODDS.values()), k=len(scenes) * variants)
    texts = []
    for n, style in enumerate(styles):
        prefix, suffix = STYLES[style]
        texts.append(prefix + caption(scenes[n // variants], random) + suffix)
    return texts


def words() -> list[str]:
    """Every word that training uses, for the tokenizers."""
    phrases = [phrase for table in (ACTION_PHRASES, PLACE_PHRASES) for group in table.values() for phrase in group]
    named = [value for name in ("species", "body", "garment") for value in VISIBLE_TRAITS[name]]
    forms = [form.format(a="a an", body="", species="", g="a", garment="") for form in CHARACTER_PHRASES]
    styles = [text for style in STYLES.values() for text in style]
    return words_of([*phrases, *named, *forms, *styles, NEGATIVE_PROMPT, "is", "and", "the"])
