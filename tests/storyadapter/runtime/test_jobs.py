"""Keys of jobs: equal where the pixels are, different where they are not."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from storyadapter.method.plan import RunPlan
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.jobs import KEY_FORMAT, Control, FrameJob, References, TextGroup, digest

PLAN = RunPlan(height=64, width=96, seed=3)
JOB = FrameJob("model", Numerics("fp16"), 64, 96, "a fox", "fog", 5.0, PLAN.sampler_in(0), 3, 0.4, ("a", "b"))
OTHER = {
    "model": "another",
    "numerics": Numerics.of("fp16", vae_decoder="fp32"),
    "height": 96,
    "width": 64,
    "prompt": "a fox ",
    "negative_prompt": "snow",
    "guidance": 5.5,
    "sampler": replace(PLAN, steps=49).sampler_in(0),
    "seed": 4,
    "scale": 0.5,
    "references": ("b", "a"),
    "guidance_interval": (0.0, 0.5),
    "start": "c",
    "control": (Control("d", 1.0, 0.0, 1.0),),
    "chunks": 2,
    "decoder": "reference_decoder",
}


def test_equal_jobs_have_equal_keys() -> None:
    assert JOB.key == replace(JOB, references=tuple("ab")).key
    assert len(JOB.key) == 64 and set(JOB.key) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", [field.name for field in fields(FrameJob)])
def test_whatever_decides_pixels_is_in_the_key(name: str) -> None:
    assert replace(JOB, **{name: OTHER[name]}).key != JOB.key


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "seed", "scale", "references", "start", "control"])
def test_frames_may_share_a_batch_that_differ_in(name: str) -> None:
    assert replace(JOB, **{name: OTHER[name]}).batch_key == JOB.batch_key


@pytest.mark.parametrize("name", ["model", "numerics", "height", "width", "sampler", "guidance_interval", "chunks"])
def test_frames_may_not_share_a_batch_that_differ_in(name: str) -> None:
    assert replace(JOB, **{name: OTHER[name]}).batch_key != JOB.batch_key


def test_guidance_may_differ_in_a_batch_but_is_there_for_all_or_none() -> None:
    assert replace(JOB, guidance=2.0).batch_key == JOB.batch_key
    assert replace(JOB, guidance=None, negative_prompt=None).batch_key != JOB.batch_key


def test_every_setting_of_a_control_counts_and_what_few_have_is_no_part_of_the_others_keys() -> None:
    controls = [Control("d", 1.0, 0.0, 1.0)]
    for change in ({"picture": "e"}, {"scale": 0.5}, {"start": 0.1}, {"end": 0.9}):
        controls.append(replace(controls[0], **change))
    keys = {replace(JOB, control=control).key for control in (*zip(controls, strict=True), (None, controls[0]), ())}
    assert len(keys) == 7
    data = asdict(JOB)
    del data["control"], data["decoder"], data["numerics"]["vae_quantization"]
    assert JOB.key == digest([KEY_FORMAT, data])


def test_the_order_of_references_counts() -> None:
    rows = torch.zeros(2, 4)
    assert References(("a", "b"), rows).key != References(("b", "a"), rows).key


def test_groups_of_texts_follow_from_the_story_alone() -> None:
    groups = TextGroup.split([str(n) for n in range(5)], 2, 64, 96)
    assert [group.texts for group in groups] == [("0", "1"), ("2", "3"), ("4",)]


def test_lone_surrogates_have_a_key_too() -> None:
    assert replace(JOB, prompt="\ud800").key != JOB.key
