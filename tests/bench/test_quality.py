"""The measures react as they should to stories whose right answer is known."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storyadapter.bench import quality, quality_run
from storyadapter.bench.quality_run import (
    COLUMNS,
    IDENTITY_COLUMNS,
    PROMPT_COLUMNS,
    accuracy,
    agreement,
    all_right,
    bootstrap,
    bootstrap_pairs,
    consistency,
    difference,
    measure,
)
from storyadapter.demo.held_out import held_out_stories, split_visible
from storyadapter.demo.vocabulary import FRAMES_AT_MOST, TRAITS
from storyadapter.method.errors import InputError

SIZES = [len(values) for values in TRAITS.values()]


def _random_labels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES, size=(*shape, len(SIZES)))


@given(st.integers(0, 999), st.integers(2, 6))
def test_one_character_in_all_frames_is_fully_consistent_and_independent_ones_are_at_chance(seed: int, n: int) -> None:
    labels = _random_labels(seed, 40, 2, n)
    assert np.all(consistency(np.repeat(labels[:, :, :1], n, axis=2)) == 1)
    chance = np.mean([1 / size for size in SIZES])
    assert abs(consistency(labels).mean() - chance) < 0.1


@given(st.integers(0, 999))
def test_consistency_is_the_share_of_agreeing_pairs(seed: int) -> None:
    labels = _random_labels(seed, 3, 2, 5)
    pairs = [(a, b) for a in range(5) for b in range(a)]
    slow = np.mean([(labels[:, :, a] == labels[:, :, b]).mean(-1) for a, b in pairs], axis=0).mean(-1)
    np.testing.assert_allclose(consistency(labels), slow)


def test_consistency_needs_two_frames() -> None:
    with pytest.raises(ValueError, match="2 frames or more, got 1"):
        consistency(_random_labels(0, 2, 1, 1))


@given(st.integers(0, 999), st.integers(0, 7))
def test_fidelity_falls_by_the_share_of_wrong_frames(seed: int, wrong: int) -> None:
    truth = _random_labels(seed, 4, 8)
    labels = truth[:, None].copy()
    labels[:, :, :wrong, 1] += 1
    np.testing.assert_allclose(accuracy(labels, truth)[:, 1], 1 - wrong / 8)
    np.testing.assert_allclose(accuracy(labels, truth)[:, 0], 1)
    np.testing.assert_allclose(all_right(labels, truth), 1 - wrong / 8)


def test_a_model_that_draws_one_character_for_all_stories_has_no_diversity() -> None:
    same = np.repeat(_random_labels(1, 1, 1, 1), 12, axis=0).repeat(4, axis=2)
    assert np.nanmax(difference(same)) == 0
    assert bootstrap_pairs(difference(same)).mean == 0
    assert bootstrap_pairs(difference(_random_labels(1, 12, 1, 4))).low > 0.5


@given(st.integers(0, 999))
def test_difference_is_the_share_of_disagreeing_frames_of_two_stories(seed: int) -> None:
    labels = _random_labels(seed, 2, 1, 3)
    slow = np.mean([labels[0, 0, a] != labels[1, 0, b] for a in range(3) for b in range(3)])
    np.testing.assert_allclose(difference(labels)[0, 1], slow)


def test_agreement_tells_the_own_story_from_another() -> None:
    own = np.repeat(_random_labels(2, 10, 2, 1), 4, axis=2)
    assert np.all(agreement(own, own) == 1)
    assert agreement(np.roll(own, 1, axis=0), own).mean() < 0.6


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
@settings(max_examples=30)
def test_the_interval_holds_the_mean_and_is_repeatable(values: list[float]) -> None:
    found = bootstrap(np.array(values))
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert found == bootstrap(np.array(values))


def test_the_interval_narrows_with_more_stories() -> None:
    few, many = (bootstrap(np.tile([0.0, 1.0], n)) for n in (5, 100))
    assert many.high - many.low < 0.4 * (few.high - few.low)


def _drawn(consistent: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of 12 stories of 6 frames, a share of whose identities is the story's own; and the truth of prompts."""
    random = np.random.default_rng(seed)
    labels = _random_labels(seed, 12, 2, 6)
    truth = labels[:, 0][..., PROMPT_COLUMNS].copy()
    labels[..., PROMPT_COLUMNS] = truth[:, None]
    own = _random_labels(99, 12, 1, 1)
    keep = random.random(labels.shape) < consistent
    identity = np.isin(np.arange(len(COLUMNS)), IDENTITY_COLUMNS)
    return np.where(keep & identity, own, labels), truth


def test_the_claim_holds_only_where_consistency_rose_and_fidelity_stayed() -> None:
    loose, truth = _drawn(0.0)
    tight = loose.copy()
    tight[..., IDENTITY_COLUMNS] = _drawn(0.95)[0][..., IDENTITY_COLUMNS]
    control = _random_labels(5, 12, 2, 6)
    assert measure(np.stack([loose, tight]), control, truth).holds() == (True, True)
    assert measure(np.stack([tight, loose]), control, truth).holds() == (False, True)
    spoilt = tight.copy()
    spoilt[..., PROMPT_COLUMNS] = (spoilt[..., PROMPT_COLUMNS] + 1) % 5
    found = measure(np.stack([loose, spoilt]), control, truth)
    assert found.holds() == (True, False)
    assert found.control.mean < found.own.mean + 0.5
    assert found.table().count("\n") == 3


def test_held_out_stories_are_of_kinds_never_trained_on_and_never_change() -> None:
    stories = held_out_stories(24, 8)
    trained, held_out = split_visible()
    assert {story.character for story in stories} == set(held_out)
    assert stories == held_out_stories(30, 8)[:24]
    for story in stories:
        assert len(set(story.scenes)) == len(story.prompts) == 8
        assert story.truth.shape == (8, 3)


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return parser.parse_args(words)


def test_the_pipeline_and_the_plain_implementation_draw_the_same(tiny: Path) -> None:
    options = ("--model", str(tiny), "--iterations", "2", "--steps", "3", "--stories", "2", "--frames", "2")
    args = _arguments(*options, "--seeds", "1", "--precision", "fp32")
    stories = held_out_stories(2, 2)
    ours, our_control = quality_run.draw_by_pipeline(stories, args)
    plain, plain_control = quality_run.draw_batched(stories, args)
    assert ours.shape == plain.shape == (3, 2, 1, 2, 3, 128, 128)
    assert (ours.float() - plain.float()).abs().mean() < 0.5
    assert (our_control.float() - plain_control.float()).abs().mean() < 0.5
    assert (ours[1:].float() - ours[:1].float()).abs().mean() > 1  # references matter
    assert (our_control.float() - ours[-1].float()).abs().mean() > 0.1


@pytest.mark.parametrize("option", ["--stories", "--frames", "--seeds", "--iterations"])
def test_too_little_to_measure_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} is 0; expected . or more"):
        quality.run(_arguments(option, "0"))


def test_more_frames_than_there_are_scenes_are_refused() -> None:
    with pytest.raises(InputError, match=f"--frames is {FRAMES_AT_MOST + 1}; expected {FRAMES_AT_MOST} or fewer"):
        quality.run(_arguments("--frames", str(FRAMES_AT_MOST + 1)))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model_index.json there"):
        quality.run(_arguments("--model", str(tmp_path)))


def test_labels_are_read_off_pictures_of_any_leading_shape() -> None:
    pictures = torch.randint(0, 255, (2, 3, 3, 128, 128), dtype=torch.uint8)
    assert quality_run.read_labels(pictures).shape == (2, 3, len(COLUMNS))
