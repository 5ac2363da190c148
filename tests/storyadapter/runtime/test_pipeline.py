"""Our pictures against the oracles', and the exact savings seen from outside."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method import constants
from storyadapter.method.errors import InputError, RunError
from storyadapter.method.events import FrameFinished, IterationFinished, PromptTruncated, RunStarted
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.runtime.pipeline import FinishedIteration
from tests.oracle.comparison import errors_of_frames
from tests.oracle.diffusers_ip_adapter import diffusers_story
from tests.oracle.published_method import MISTAKES, published_story
from tests.refusals import raises_typed
from tests.storyadapter.runtime.replaced import counting

ALLOWED = 0.5  # of 255, mean over a frame: what the design demands
TIGHT = 0.05  # what two fp32 implementations give, so that a wrong reference is seen
PROMPTS = (
    "a red fox runs in the snow",
    "a small owl sleeps in a tree at night",
    "the fox and the owl share soup by the fire",
)
PLAN = RunPlan(height=64, width=64, seed=3, steps=4, scales=(0.3, 0.5), prompt_chunks="1")
ORACLE = dict(scales=(0.3, 0.5), steps=4, seed=3, height=64, width=64, style="comic")


def open_tiny(folder: Path, **options: Any) -> StoryPipeline:
    checkpoint = Checkpoint.open(
        base_model=folder, image_encoder=folder / "image_encoder", ip_adapter=folder / "ip-adapter.safetensors"
    )
    return StoryPipeline(open_networks(checkpoint, **options), checkpoint.load_tokenizers())


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path) -> StoryPipeline:
    return open_tiny(tiny_model_dir)


def draw(
    pipeline: StoryPipeline,
    plan: RunPlan = PLAN,
    prompts: tuple[str, ...] = PROMPTS,
    resume: FinishedIteration | None = None,
    style: str = "comic",
) -> list[list[Image.Image]]:
    pictures: dict[int, list[Image.Image]] = {}
    for event in pipeline.run(Story(prompts), plan, style=style, resume=resume):
        if isinstance(event, FrameFinished):
            pictures.setdefault(event.iteration, []).append(event.picture)
    return list(pictures.values())


@pytest.fixture(scope="module")
def ours(pipeline: StoryPipeline) -> list[list[Image.Image]]:
    return draw(pipeline)


@pytest.fixture(scope="module")
def oracle_files(tiny_model_dir: Path) -> tuple[Path, Path, Path]:
    return tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors"


@pytest.mark.parametrize("oracle", [published_story, diffusers_story])
def test_pictures_are_the_oracles_in_every_iteration(ours: list[list[Image.Image]], oracle: Any, oracle_files) -> None:
    theirs = oracle(*oracle_files, PROMPTS, **ORACLE)
    assert len(ours) == len(theirs) == 3
    for mine, expected in zip(ours, theirs, strict=True):
        assert max(errors_of_frames(mine, expected)) < TIGHT


def test_pictures_are_the_oracles_without_guidance_and_off_the_square(pipeline: StoryPipeline, oracle_files) -> None:
    plan = replace(PLAN, guidance=1.0, width=96, scales=(0.4,), negative_prompt="blurry")
    theirs = published_story(
        *oracle_files, PROMPTS[:2], **ORACLE | dict(guidance=1.0, width=96, scales=(0.4,), style="film")
    )
    for mine, expected in zip(draw(pipeline, plan, PROMPTS[:2], style="film"), theirs, strict=True):
        assert mine[0].size == (96, 64)
        assert max(errors_of_frames(mine, expected)) < TIGHT


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_method_misses_by_a_wide_margin(
    ours: list[list[Image.Image]], mistake: Any, oracle_files
) -> None:
    wrong = published_story(*oracle_files, PROMPTS, **ORACLE, mistake=mistake)
    for iteration in (1, 2):
        assert np.mean(errors_of_frames(ours[iteration], wrong[iteration])) > 10 * ALLOWED


def test_steps_and_guidance_of_each_iteration_are_its_own(pipeline: StoryPipeline) -> None:
    """An iteration with settings of its own draws what a story with these settings draws from the same pictures."""
    mixed = draw(pipeline, replace(PLAN, steps=(4, 2, 3), guidance=(5.0, 1.0, 3.0), guidance_interval=(0.0, 0.7)))
    first = replace(PLAN, scales=(), guidance_interval=(0.0, 0.7))
    assert max(errors_of_frames(mixed[0], draw(pipeline, first)[0])) < TIGHT
    for iteration, changes in ((1, {"steps": 2, "guidance": 1.0}), (2, {"steps": 3, "guidance": 3.0})):
        interval = (0.0, 0.7) if changes["guidance"] > 1 else (0.0, 1.0)
        alone = replace(PLAN, scales=PLAN.scales[:iteration], guidance_interval=interval, **changes)
        drawn = draw(pipeline, alone, resume=FinishedIteration(iteration - 1, mixed[iteration - 1]))
        assert max(errors_of_frames(mixed[iteration], drawn[0])) < TIGHT


COUNTED = ("text_encoder", "text_projection", "image_encoder", "reference_projection", "denoiser", "vae_decoder")


@pytest.mark.parametrize(("guidance", "prompts", "rows"), [(5.0, 4, 6), (1.0, 3, 3)])
def test_nothing_is_computed_twice(pipeline: StoryPipeline, guidance: float, prompts: int, rows: int) -> None:
    networks, counts = counting(pipeline.networks, *COUNTED)
    pipeline = StoryPipeline(networks, (pipeline.tokenizers.first, pipeline.tokenizers.second))
    draw(pipeline, replace(PLAN, guidance=guidance))
    guided = guidance > 1
    assert counts == {
        "text_encoder": 1,
        "text_encoder rows": prompts,  # one per frame, and the negative prompt once
        "text_projection": 1,
        "text_projection rows": prompts,
        "image_encoder": 2,
        "image_encoder rows": 2 * 3,  # N per iteration with references
        "reference_projection": 2 * (1 + guided),  # once per iteration, of the story and of the unconditional row
        "reference_projection rows": 2 * (3 + guided),
        "denoiser": 3 * 4,
        "denoiser rows": 3 * 4 * rows,
        "vae_decoder": 3,
        "vae_decoder rows": 3 * 3,
    }


def test_batching_does_not_change_pictures(pipeline: StoryPipeline) -> None:
    prompts = tuple(f"a fox and {n} owls" for n in range(7))
    plan = replace(PLAN, steps=2, scales=(0.5,))
    one_by_one = draw(pipeline, replace(plan, max_frames=1), prompts)
    by_four = draw(pipeline, replace(plan, max_frames=4), prompts)
    for first, second in zip(sum(one_by_one, []), sum(by_four, []), strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1


def test_seven_frames_by_four_are_four_and_three(pipeline: StoryPipeline) -> None:
    networks, counts = counting(pipeline.networks, *COUNTED)
    counted = StoryPipeline(networks, (pipeline.tokenizers.first, pipeline.tokenizers.second))
    plan = replace(PLAN, steps=1, scales=(), max_frames=4)
    (started, *_) = [e for e in counted.run(Story(("a fox",) * 7), plan) if isinstance(e, RunStarted)]
    assert [len(batch) for batch in started.batches] == [4, 3]
    assert counts["denoiser rows"] == 2 * (4 + 3)


def test_a_resumed_run_yields_the_same_pictures(pipeline: StoryPipeline, ours: list[list[Image.Image]]) -> None:
    rest = draw(pipeline, resume=FinishedIteration(0, ours[0]))
    assert [[np.asarray(p).tobytes() for p in row] for row in rest] == [
        [np.asarray(p).tobytes() for p in row] for row in ours[1:]
    ]


def test_a_resumed_run_wants_a_picture_of_every_frame(pipeline: StoryPipeline, ours: list[list[Image.Image]]) -> None:
    with pytest.raises(InputError, match="^a finished iteration has 4 pictures; expected the story's 3$"):
        draw(pipeline, resume=FinishedIteration(0, [*ours[0], ours[0][0]]))


@pytest.mark.parametrize(
    ("changes", "prompts", "told"),
    [
        ({"max_frames": 3}, 3, "--max-frames: 3 asked for; this engine was built for 1 to 2"),
        ({}, 5, "the story's frames and pictures (--max-references): 5 asked for; this engine was built for 1 to 4"),
        ({"height": 128}, 1, "--height: 128 asked for; this engine was built for 64 to 96"),
        ({"width": 96}, 1, "--width: 96 asked for; this engine was built for 64 to 64"),
    ],
)
def test_what_an_engine_was_not_built_for_is_told_as_it_was_typed(
    pipeline: StoryPipeline, changes: dict[str, int], prompts: int, told: str
) -> None:
    letters = ShapeRanges(2, 4, Range(64, 96), Range(64, 64)).letters()
    built = StoryPipeline(
        replace(pipeline.networks, letters=letters), (pipeline.tokenizers.first, pipeline.tokenizers.second)
    )
    built.run(Story(("a fox",) * 4), replace(PLAN, max_frames=2))
    with raises_typed(InputError, match=f"^{re.escape(told)}$"):
        built.run(Story(("a fox",) * prompts), replace(PLAN, **changes))


def test_other_references_give_other_pictures(pipeline: StoryPipeline, ours: list[list[Image.Image]]) -> None:
    rest = draw(pipeline, resume=FinishedIteration(0, ours[0][::-1][:2] + [ours[2][0]]))
    assert np.mean(errors_of_frames(rest[0], ours[1])) > ALLOWED


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", EulerDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
        ("lcm", LCMScheduler),  # draws noise in every step
    ],
)
def test_other_samplers_draw_what_diffusers_draws(
    pipeline: StoryPipeline, tiny_model_dir: Path, name: str, scheduler: Any
) -> None:
    known = inspect.signature(scheduler).parameters
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_model_dir, add_watermarker=False)
    theirs.scheduler = scheduler(**{key: value for key, value in constants.DDIM_CONFIG.items() if key in known})
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS[0],
        negative_prompt=constants.NEGATIVE_PROMPT,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
    ).images
    pictures = draw(pipeline, replace(PLAN, scheduler=name, scales=()), PROMPTS[:1], style="none")
    assert max(errors_of_frames(pictures[0], expected)) < TIGHT


def test_stages_are_timed(pipeline: StoryPipeline) -> None:
    events = list(pipeline.run(Story(PROMPTS), replace(PLAN, steps=1, scales=(0.3,))))
    finished = [event for event in events if isinstance(event, IterationFinished)]
    assert [set(event.seconds) for event in finished] == [{"references", "denoise", "decode"}] * 2
    assert all(seconds > 0 for event in finished for seconds in event.seconds.values())


def test_a_long_prompt_names_the_words_cut_off(pipeline: StoryPipeline) -> None:
    words = [f"word{n}" for n in range(60)]
    story = Story(("a fox", " ".join(words)))
    warnings = [e for e in pipeline.run(story, replace(PLAN, steps=1, scales=())) if isinstance(e, PromptTruncated)]
    assert [event.frame for event in warnings] == [1]
    cut = warnings[0].words.split()
    assert 0 < len(cut) < 60 and cut == words[-len(cut) :]


def test_every_text_that_is_cut_is_told_once(pipeline: StoryPipeline) -> None:
    long = " ".join(f"word{n}" for n in range(60))
    story = Story(({"prompt": "a fox", "negative": f"snow {long}"}, "an owl", "a bear"))
    plan = replace(PLAN, steps=1, scales=(), negative_prompt=long)
    told = [event for event in pipeline.run(story, plan) if isinstance(event, PromptTruncated)]
    assert [(event.frame, event.negative) for event in told] == [(0, True), (None, True)]
    assert not [e for e in pipeline.run(story, replace(plan, guidance=1.0)) if isinstance(e, PromptTruncated)]


def test_a_frame_may_have_its_own_seed_and_negative_prompt(pipeline: StoryPipeline) -> None:
    own = ({"prompt": PROMPTS[0], "seed": 11}, {"prompt": PROMPTS[1], "negative": "snow"}, PROMPTS[2])

    def drawn(prompts: tuple[Any, ...], plan: RunPlan) -> tuple[list[Image.Image], list[str]]:
        events = [e for e in pipeline.run(Story(prompts), plan, style="none") if isinstance(e, FrameFinished)]
        return [event.picture for event in events], [event.key for event in events]

    plan = replace(PLAN, scales=())
    mixed, keys = drawn(own, plan)
    others = drawn(PROMPTS, replace(plan, seed=11)), drawn(PROMPTS, replace(plan, negative_prompt="snow"))
    expected = [others[0][0][0], others[1][0][1], drawn(PROMPTS, plan)[0][2]]
    assert max(errors_of_frames(mixed, expected)) < TIGHT
    assert min(errors_of_frames(mixed[:2], drawn(PROMPTS, plan)[0][:2])) > ALLOWED
    assert keys == [others[0][1][0], others[1][1][1], drawn(PROMPTS, plan)[1][2]]


def test_a_frame_that_is_not_finite_stops_the_run_before_it_becomes_a_reference(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for item in tiny_model_dir.iterdir():
        if item.name != "vae":
            (broken / item.name).symlink_to(item)
    (broken / "vae").mkdir()
    (broken / "vae" / "config.json").symlink_to(tiny_model_dir / "vae" / "config.json")
    weights = load_file(tiny_model_dir / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] = torch.full_like(weights["decoder.conv_out.bias"], torch.inf)
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    damaged = f"so is decoder.conv_out.bias in {broken}/vae/diffusion_pytorch_model.safetensors; the file is damaged"
    with raises_typed(RunError, match=f"frame 0: the VAE gave values that are not finite in fp32: {damaged}"):
        draw(open_tiny(broken))
