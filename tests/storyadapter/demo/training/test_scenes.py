"""The world: the same seed draws the same picture, every trait is drawn, and captions never tell an identity."""

from dataclasses import fields, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storyadapter.demo.training import characters
from storyadapter.demo.training.scenes import Character, Scene, caption, draw, labels, random_identity
from storyadapter.demo.vocabulary import (
    ACTION_PHRASES,
    IDENTITY_TRAITS,
    PLACE_PHRASES,
    VISIBLE_TRAITS,
    Identity,
    Visible,
    all_visible,
)

visibles = st.builds(Visible, **{f.name: st.sampled_from(VISIBLE_TRAITS[f.name]) for f in fields(Visible)})
identities = st.builds(Identity, **{name: st.sampled_from(values) for name, values in IDENTITY_TRAITS.items()})
scenes = st.builds(
    Scene,
    character=st.builds(Character, visibles, identities),
    action=st.sampled_from(VISIBLE_TRAITS["action"]),
    place=st.sampled_from(VISIBLE_TRAITS["place"]),
    seed=st.integers(0, 2**32 - 1),
)
EXAMPLE = Scene(
    Character(Visible("fox", "blue", "red"), Identity("spots", "white", "upright", "none", "green", "tall", "plain")),
    "standing",
    "room",
    5,
)


@settings(max_examples=30, deadline=None)
@given(scenes)
def test_the_same_scene_is_the_same_picture(scene: Scene) -> None:
    first, second = draw(scene), draw(scene)
    assert first.size == (128, 128) and first.mode == "RGB"
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", IDENTITY_TRAITS)
def test_every_value_of_an_identity_trait_is_seen(name: str) -> None:
    drawn = []
    for value in IDENTITY_TRAITS[name]:
        identity = replace(EXAMPLE.character.identity, **{name: value})
        scene = replace(EXAMPLE, character=replace(EXAMPLE.character, identity=identity))
        drawn.append(np.asarray(draw(scene), dtype=float))
    for n, one in enumerate(drawn):
        for other in drawn[:n]:
            assert (np.abs(one - other).max(-1) > 40).sum() > 40  # pixels that clearly differ


def test_the_seed_moves_the_character_and_the_place_but_no_trait() -> None:
    other = replace(EXAMPLE, seed=6)
    assert draw(other).tobytes() != draw(EXAMPLE).tobytes()
    assert labels(other) == labels(EXAMPLE)


@given(scenes, st.integers(0, 999))
def test_a_caption_is_the_same_for_every_identity(scene: Scene, seed: int) -> None:
    somebody = replace(scene, character=replace(scene.character, identity=random_identity(Random(seed))))
    assert caption(scene, Random(seed)) == caption(somebody, Random(seed))
    assert caption(scene) == caption(somebody)


@given(scenes, st.integers(0, 999))
def test_a_caption_names_species_action_and_place(scene: Scene, seed: int) -> None:
    for text in (caption(scene), caption(scene, Random(seed))):
        assert scene.character.visible.species in text
        assert any(phrase in text for phrase in ACTION_PHRASES[scene.action])
        assert any(phrase in text for phrase in PLACE_PHRASES[scene.place])


def test_no_identity_word_is_in_any_caption() -> None:
    telling = {
        "spots",
        "stripes",
        "patch",
        "blaze",
        "ears",
        "hat",
        "crown",
        "beanie",
        "bow",
        "eyes",
        "striped",
        "starred",
    }
    for n, visible in enumerate(all_visible()):
        scene = replace(EXAMPLE, character=replace(EXAMPLE.character, visible=visible))
        assert not telling & set(caption(scene, Random(n)).replace(",", "").replace(".", "").split())


@given(scenes)
def test_labels_find_the_values_again(scene: Scene) -> None:
    found = labels(scene)
    for name in IDENTITY_TRAITS:
        assert IDENTITY_TRAITS[name][found[name]] == getattr(scene.character.identity, name)
    assert VISIBLE_TRAITS["action"][found["action"]] == scene.action
    assert VISIBLE_TRAITS["place"][found["place"]] == scene.place


def test_every_colour_of_the_vocabulary_can_be_drawn() -> None:
    assert tuple(characters.BODY_COLOURS) == VISIBLE_TRAITS["body"]
    assert tuple(characters.GARMENT_COLOURS) == VISIBLE_TRAITS["garment"]
    assert tuple(characters.MARKING_COLOURS) == IDENTITY_TRAITS["marking_colour"]
    assert tuple(characters.EYE_COLOURS) == IDENTITY_TRAITS["eyes"]
