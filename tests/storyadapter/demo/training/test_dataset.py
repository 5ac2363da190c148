"""Which pictures there are: held-out kinds stay out, and drawing by several processes changes nothing."""

from pathlib import Path

import numpy as np

from storyadapter.demo.held_out import HELD_OUT_PER_SPECIES, split_visible
from storyadapter.demo.training import dataset
from storyadapter.demo.training.scenes import draw
from storyadapter.demo.vocabulary import TRAITS, all_visible
from storyadapter.method.constants import STYLES

SIZE = dataset.WorldSize(visible=2, identities=2, views=2)


def test_held_out_kinds_are_never_trained_on() -> None:
    trained, held_out = split_visible()
    assert not set(trained) & set(held_out)
    assert set(trained) | set(held_out) == set(all_visible())
    species = [kind.species for kind in held_out]
    assert all(species.count(s) == HELD_OUT_PER_SPECIES for s in set(species))
    largest = dataset.WorldSize(visible=len(trained), identities=1, views=1)
    assert not {s.character.visible for s in dataset.training_scenes(largest, 0)} & set(held_out)


def test_scenes_come_as_kind_identity_view() -> None:
    scenes = dataset.training_scenes(SIZE, seed=1)
    assert len(scenes) == SIZE.pictures == 8
    for n in range(0, 8, 2):
        assert scenes[n].character == scenes[n + 1].character
    assert scenes[0].character.visible == scenes[3].character.visible != scenes[4].character.visible
    assert scenes == dataset.training_scenes(SIZE, seed=1) != dataset.training_scenes(SIZE, seed=2)


def test_processes_draw_what_one_draws(tmp_path: Path) -> None:
    scenes = dataset.mixed_scenes(300, seed=3)  # more than one chunk
    pictures = dataset.draw_all(scenes, tmp_path / "all.npy", workers=2)
    assert pictures.shape == (300, 128, 128, 3) and pictures.dtype == np.uint8
    for n in (0, 255, 256, 299):
        assert np.array_equal(pictures[n], np.asarray(draw(scenes[n])))
    assert [p.name for p in tmp_path.iterdir()] == ["all.npy"]


def test_captions_are_prompts_of_every_style() -> None:
    texts = dataset.captions(dataset.mixed_scenes(60, seed=0), variants=2, seed=0)
    assert len(texts) == 120
    assert texts == dataset.captions(dataset.mixed_scenes(60, seed=0), variants=2, seed=0)
    for prefix, suffix in STYLES.values():
        assert any(text.startswith(prefix) and text.endswith(suffix) for text in texts)


def test_labels_are_columns_of_all_traits() -> None:
    table = dataset.label_table(dataset.mixed_scenes(40, seed=0))
    assert table.shape == (40, len(TRAITS))
    assert (table >= 0).all() and (table < [len(values) for values in TRAITS.values()]).all()
