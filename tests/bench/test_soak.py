"""The soak test passes where nothing is wrong, and sees a leak and a picture that changed."""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.bench import soak
from storyadapter.bench.soak_run import (
    SoakStory,
    StoryRecord,
    growth_of,
    picture_sizes,
    problems_of,
    stories,
)
from storyadapter.method.errors import InputError
from storyadapter.method.events import Event, FrameFinished
from storyadapter.runtime.pipeline import StoryPipeline
from tests.refusals import raises_typed

STORY = SoakStory(2, 64, 64, 1, 1)


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    soak.add_arguments(parser)
    options = ("--synthetic-weights", "toy", "--backend", "eager", "--steps", "1", "--max-references", "2")
    return parser.parse_args([*options, "--max-frames", "2", *words])


def _records(*digests: str) -> list[StoryRecord]:
    return [StoryRecord(STORY, True, 1.0, digest, 0) for digest in digests]


@given(st.integers(0, 999), st.integers(1, 9))
def test_every_third_story_is_the_first_one(seed: int, most: int) -> None:
    drawn = list(islice(stories(seed, [64, 96], most), 12))
    assert set(drawn[::3]) == {drawn[0]}
    assert drawn[0].frames == most and (drawn[0].height, drawn[0].width) == (96, 96)
    for story in drawn:
        assert 1 <= story.frames <= most and {story.height, story.width} <= {64, 96}
    assert drawn == list(islice(stories(seed, [64, 96], most), 12))
    assert len({story.seed for story in drawn}) > 5


def test_caches_that_fill_are_no_growth_and_a_leak_is() -> None:
    assert growth_of([100, 300, 500, 500, 500, 500, 500, 500, 500]) == 0
    assert growth_of([100, 200, 300, 400, 500, 600, 700, 800, 900]) == 300
    assert growth_of([500, 520, 500, 520, 500, 520, 500, 520, 500]) == 0
    assert growth_of([5, 9]) == 0


def test_problems_in_words() -> None:
    assert problems_of(_records("a", "a", "a"), 32 * 2**20, 32 * 2**20) == []
    assert problems_of(_records("a", "a", "a"), 33 * 2**20, 32 * 2**20) == ["memory grew by 33 MiB; allowed are 32 MiB"]
    (told,) = problems_of(_records("a", "b", "a", "c"), 0, 1)
    assert told == "the repeated story gave other pictures in 2 of 3 repeats"
    (few,) = problems_of(_records("a", "a"), 0, 1)
    assert "too few to see memory grow" in few


def test_sizes_are_served_by_the_model() -> None:
    assert picture_sizes(64) == [64, 96]
    assert picture_sizes(128) == [64, 96, 128]
    assert picture_sizes(1024) == [512, 768, 1024]


def test_a_short_soak_passes_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.run(_arguments("--stories", "9", "--sizes", "96,64", "--out", str(tmp_path / "soak"))) == 0
    data = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert data["kind"] == "soak" and data["passed"] and data["problems"] == []
    assert len(data["stories"]) == 9 and sum(item["repeated"] for item in data["stories"]) == 3
    assert len({item["digest"] for item in data["stories"]}) == 7
    assert all(item["memory"] > 0 and item["seconds"] > 0 for item in data["stories"])
    assert {item["story"]["height"] for item in data["stories"]} == {64, 96}
    page = (tmp_path / "soak.md").read_text(encoding="utf-8")
    assert "| verdict | passed |" in page and page in capsys.readouterr().out


def test_a_leak_and_a_changed_picture_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    run = StoryPipeline.run

    def leaking(self: StoryPipeline, *args: object, **options: object) -> Iterator[Event]:
        for event in run(self, *args, **options):
            if isinstance(event, FrameFinished):
                kept.append(bytes([len(kept) % 256]) * (4 * 2**20))
                event.picture.putpixel((0, 0), (len(kept) % 256, 0, 0))
            yield event

    monkeypatch.setattr(StoryPipeline, "run", leaking)
    from storyadapter.bench.soak_run import soak as draw

    found = draw(_arguments(), 18)
    assert found.growth > found.allowed
    assert len(found.problems) == 2


def test_memory_is_that_of_the_device_that_runs_the_networks(
    tiny_model_dir: Path, tiny_engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a GPU, onnxruntime runs on the CPU all the same, and the GPU's memory says nothing."""
    from storyadapter.bench import model, soak_run

    monkeypatch.setattr(model, "default_device", lambda: torch.device("meta"))
    args = _arguments(
        *("--backend", "onnxruntime", "--max-frames", "3", "--max-references", "100", "--sizes", "64"),
        *("--base-model", str(tiny_model_dir), "--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--engine-dir", str(tiny_engine_dir)),
    )
    args.synthetic_weights = None
    found = soak_run.soak(args, 1)
    assert found.device == "cpu" and found.stories[0].memory > 0


def test_minutes_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.run(_arguments("--minutes", "0.0001")) == 1
    assert "only 1 of the repeated story" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stories", "8"), "--stories is 8; expected 9 or more"),
        (("--steps", "0"), "--steps is 0; expected 1 or more"),
        (("--worker-kills", "5"), "--worker-kills without --workers; expected both"),
        (("--kills", "5"), "--kills with random weights, which no other process can read; leave one of them out"),
        (("--sizes", "64,90"), "--sizes is 90; expected a multiple of 32"),
        (("--minutes", "0"), "--minutes is 0; expected more than 0"),
        (("--base-model", "x"), "expected one of --base-model, --synthetic-weights"),
        (("--lora", "x", "--vae", "y"), "--vae with random weights; expected one of --vae, --synthetic-weights"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str) -> None:
    with raises_typed(InputError, message):
        soak.run(_arguments(*words))
