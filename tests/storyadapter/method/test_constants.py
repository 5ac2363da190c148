"""The published constants, against those that the oracle states on its own."""

import pytest
from diffusers import DDIMScheduler

from storyadapter.method import constants
from tests.oracle import published_method


def test_every_style_reads_as_published() -> None:
    assert constants.STYLES.keys() == published_method.STYLES.keys()
    for style, (before, after) in constants.STYLES.items():
        assert before + "a fox" + after == published_method.STYLES[style].format("a fox")


def test_negative_prompt_and_text_positions() -> None:
    assert constants.NEGATIVE_PROMPT == published_method.NEGATIVE_PROMPT
    assert constants.TEXT_TOKENS == published_method.TEXT_POSITIONS


def test_the_scheduler_is_the_published_one() -> None:
    published = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    ours = DDIMScheduler(**constants.DDIM_CONFIG)
    assert {**ours.config, "_use_default_values": []} == {**published.config, "_use_default_values": []}


@pytest.mark.parametrize("iterations", [1, 2, 10, 13])
def test_scales_rise_evenly_from_the_first_to_the_last(iterations: int) -> None:
    scales = constants.reference_scales(iterations)
    assert len(scales) == iterations
    assert scales[0] == 0.3
    if iterations > 1:
        assert scales[-1] == 0.5
        assert scales[1] - scales[0] == pytest.approx(0.2 / (iterations - 1))


def test_a_run_without_iterations_has_no_scales() -> None:
    assert constants.reference_scales(0) == ()
