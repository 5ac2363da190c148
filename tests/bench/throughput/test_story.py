"""Whole stories on the toy model: the pipeline draws what its parts draw one after the other."""

from dataclasses import replace

import pytest
import torch

from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.throughput.cases import StoryCase
from storyadapter.bench.throughput.story import as_two_stories, in_sequence, measure_story, overlapped, plan_of
from storyadapter.bench.throughput.workbench import with_compiled_vae, with_eager_vae
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.runtime.psnr import psnr_of_each

CASE = StoryCase("story", frames=3, iterations=1, steps=2, max_frames=2, height=64, width=96)


@pytest.fixture(scope="module")
def model() -> BenchmarkModel:
    return BenchmarkModel.synthetic("toy", EngineChoice("eager", "fp32"), torch.device("cpu"))


def test_both_ways_draw_the_same(model: BenchmarkModel) -> None:
    pixels = Range(64, 96)
    networks = model.open(ShapeRanges(2, 3, pixels, pixels), print).networks
    tokenizers = model.tokenizers()
    options = (networks, tokenizers, CASE, model.prediction_type)
    plain, drawn = measure_story(in_sequence, "one after the other", *options, None)
    beside, again = measure_story(overlapped, "overlapped", *options, drawn)
    assert plain.psnr is None and beside.psnr is not None and beside.psnr > 50
    assert len(again.pictures) == 3 and again.pictures[0].size == (96, 64)
    assert set(plain.stages) == {"text", "references", "denoise", "decode"}
    assert {"denoise", "decode"} <= set(beside.stages)
    for result in (plain, beside):
        assert result.drawn == 6 and result.unet_rows == 2 * 2 * 6
        assert result.rows_per_second == pytest.approx(24 / result.seconds)
        assert result.seconds_per_frame == pytest.approx(result.seconds / 3)
        assert result.same_vae
    two, halves = measure_story(as_two_stories, "as two stories at once", *options, None)
    assert len(halves.pictures) == 3 and two.unet_rows == plain.unet_rows
    half = with_eager_vae(networks, model, "bf16")
    rounded, _ = measure_story(overlapped, "overlapped", half, *options[1:], drawn)
    assert not rounded.same_vae and rounded.vae_precision == "bf16"
    assert 30 < (rounded.psnr or 0) < (beside.psnr or 0)


def test_a_vae_is_compiled_for_another_precision(model: BenchmarkModel) -> None:
    pixels = Range(64, 64)
    ranges = ShapeRanges(2, 3, pixels, pixels)
    networks = model.open(ranges, print).networks
    with_letters = replace(networks, letters=ranges.letters(networks.geometry.pixels_per_latent))
    told: list[str] = []
    compiled = with_compiled_vae(with_letters, model, ranges, "bf16", told.append)
    assert "VAE in bf16" in told[0] and "built first" in told[0]
    assert told[1:] and all(line.startswith("    building inductor: vae_decoder in bf16: ") for line in told[1:])
    assert compiled.numerics["vae_decoder"] == "bf16" and compiled["denoiser"] is networks["denoiser"]
    latents = torch.randn(2, 4, 8, 8) * 0.1
    with torch.inference_mode():
        expected = networks["vae_decoder"]({"latents": latents})["image"]
        found = compiled["vae_decoder"]({"latents": latents.bfloat16()})["image"].float()
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 6e-2


def test_a_story_depends_on_its_references(model: BenchmarkModel) -> None:
    """So that the comparison of the two ways would see that one of them loses them."""
    pixels = Range(64, 96)
    networks = model.open(ShapeRanges(2, 3, pixels, pixels), print).networks
    plan, tokenizers = plan_of(CASE, model.prediction_type), model.tokenizers()
    draw = in_sequence(networks, tokenizers)
    drawn = draw(plan, 3)
    text_alone = plan_of(StoryCase("", 3, 0, 2, 2, 64, 96), model.prediction_type)
    assert min(psnr_of_each(draw(text_alone, 3).pictures, drawn.pictures)) < 34
