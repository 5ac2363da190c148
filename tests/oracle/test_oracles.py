"""The two oracles agree with each other, and a comparison with them sees what it must see."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.oracle.comparison import errors_of_frames, mean_absolute_error
from tests.oracle.diffusers_ip_adapter import diffusers_story
from tests.oracle.published_method import (
    MISTAKES,
    STYLES,
    Mistake,
    load_published_model,
    published_frame,
    published_story,
)

ALLOWED = 0.5  # of 255, mean over a frame: what the project's pictures may differ from the oracles'
PROMPTS = (
    "a red fox runs in the snow",
    "a small owl sleeps in a tree at night",
    "the fox and the owl share soup by the fire",
)
SETTINGS = dict(scales=(0.3, 0.5), steps=4, seed=3, height=64, width=64, style="comic")


def files(folder: Path) -> tuple[Path, Path, Path]:
    return folder, folder / "image_encoder", folder / "ip-adapter.safetensors"


@pytest.fixture(scope="module")
def story(tiny_model_dir: Path) -> list[list[Image.Image]]:
    return published_story(*files(tiny_model_dir), PROMPTS, **SETTINGS)


def test_they_agree_in_every_iteration(tiny_model_dir: Path, story: list[list[Image.Image]]) -> None:
    other = diffusers_story(*files(tiny_model_dir), PROMPTS, **SETTINGS)
    assert len(story) == len(other) == 3
    for iteration, (ours, theirs) in enumerate(zip(story, other, strict=True)):
        # Both are fp32 on one machine, so they are far closer than what the project is allowed.
        assert max(errors_of_frames(ours, theirs)) < ALLOWED / 10, f"iteration {iteration}"


def test_they_agree_without_guidance_and_off_the_square(tiny_model_dir: Path) -> None:
    settings = SETTINGS | dict(guidance=1.0, width=96, style="film", scales=(0.4,), negative_prompt="blurry")
    ours = published_story(*files(tiny_model_dir), PROMPTS[:2], **settings)
    theirs = diffusers_story(*files(tiny_model_dir), PROMPTS[:2], **settings)
    assert ours[1][0].size == (96, 64)
    for one, other in zip(ours, theirs, strict=True):
        assert max(errors_of_frames(one, other)) < ALLOWED / 10


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen_by_a_wide_margin(
    tiny_model_dir: Path, story: list[list[Image.Image]], mistake: Mistake
) -> None:
    wrong = published_story(*files(tiny_model_dir), PROMPTS, **SETTINGS, mistake=mistake)
    assert errors_of_frames(story[0], wrong[0]) == [0.0, 0.0, 0.0]
    for iteration in (1, 2):
        assert np.mean(errors_of_frames(story[iteration], wrong[iteration])) > 10 * ALLOWED, f"iteration {iteration}"


@pytest.mark.parametrize("wrong", ["stale", "one missing", "one of them for all", "squeezed with another filter"])
def test_wrong_references_are_seen(tiny_model_dir: Path, story: list[list[Image.Image]], wrong: str) -> None:
    """Only because the tiny model's adapter tells pictures apart; with plainly random weights it hardly does."""
    references = {
        "stale": story[0],
        "one missing": story[1][:-1],
        "one of them for all": [story[1][0]] * 3,
        "squeezed with another filter": [frame.resize((256, 256), Image.Resampling.BILINEAR) for frame in story[1]],
    }[wrong]
    model = load_published_model(*files(tiny_model_dir))
    frame = published_frame(
        model,
        STYLES["comic"].format(PROMPTS[0]),
        references,
        0.5,
        steps=4,
        seed=3,
        height=64,
        width=64,
        guidance=5.0,
        negative_prompt="monochrome, lowres, bad anatomy, worst quality, low quality",
    )
    assert mean_absolute_error(frame, story[2][0]) > ALLOWED


def test_the_order_of_the_references_means_nothing(tiny_model_dir: Path, story: list[list[Image.Image]]) -> None:
    model = load_published_model(*files(tiny_model_dir))
    drawing = dict(steps=2, seed=1, height=64, width=64, guidance=5.0, negative_prompt="")
    first, second = (
        published_frame(model, "a fox", references, 0.5, **drawing) for references in (story[0], story[0][::-1])
    )
    assert mean_absolute_error(first, second) < 0.01


def test_a_frame_is_a_picture_and_depends_on_seed_and_prompt(
    tiny_model_dir: Path, story: list[list[Image.Image]]
) -> None:
    for frame in story[2]:
        values = np.asarray(frame)
        assert values.std() > 20
        assert np.isin(values, (0, 255)).mean() < 0.2
    assert min(errors_of_frames(story[2][:2], story[2][1:])) > 10 * ALLOWED
    other_seed = published_story(*files(tiny_model_dir), PROMPTS[:1], **SETTINGS | dict(seed=4, scales=()))
    assert mean_absolute_error(other_seed[0][0], story[0][0]) > 10 * ALLOWED


def test_a_pickled_adapter_is_the_same_adapter(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder, encoder, adapter = files(tiny_model_dir)
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(adapter).items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    torch.save(parts, tmp_path / "ip-adapter.bin")
    one, other = (load_published_model(folder, encoder, path) for path in (adapter, tmp_path / "ip-adapter.bin"))
    assert one.adapter_layers.keys() == other.adapter_layers.keys()
    assert len(one.adapter_layers) == 7
    for name, pair in one.adapter_layers.items():
        torch.testing.assert_close(pair, other.adapter_layers[name], rtol=0, atol=0)
    torch.testing.assert_close(one.image_projection, other.image_projection, rtol=0, atol=0)


def test_the_measure_of_difference() -> None:
    black = Image.new("RGB", (8, 8))
    half = Image.new("RGB", (8, 8))
    half.paste((30, 0, 0), (0, 0, 8, 4))
    assert mean_absolute_error(black, black) == 0
    assert mean_absolute_error(black, half) == mean_absolute_error(half, black) == pytest.approx(5)
