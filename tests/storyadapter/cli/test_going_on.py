"""More rounds, and more frames, of a story that was finished."""

import json
from pathlib import Path

import numpy as np
import pytest

from storyadapter.output.frame_files import read_picture
from tests.storyadapter.cli.running import Type, files


def identity(out: str = "out") -> dict:
    return json.loads(Path(out, "story.json").read_text())["identity"]


def frames(out: str, iteration: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(out).glob(f"iteration-{iteration:02d}/*.png"))]


def with_words(words: list[str], after: str, *more: str) -> list[str]:
    place = words.index(after) + 1
    return [*words[:place], *more, *words[place:]]


@pytest.mark.parametrize("keep", ["all", "last"])
def test_more_iterations_repeat_the_last_scale(type_in: Type, quick_run: list[str], keep: str) -> None:
    words = [*quick_run, "--keep", keep]
    assert type_in(*words).code == 0
    drawn = [frames("out", iteration) for iteration in range(3)]
    refused = type_in(*words, "--iterations", "4")
    assert refused.code == 2 and "plan" not in refused.err
    done = type_in(*words, "--iterations", "4", "--resume")
    assert done.code == 0, done.err
    assert "5 rounds (3 finished), about " in done.err
    assert identity()["plan"]["scales"] == [0.3, 0.5, 0.5, 0.5]
    if keep == "all":
        assert [frames("out", iteration) for iteration in range(3)] == drawn
    at = quick_run.index("--iterations")
    anew = [*quick_run[:at], "--scales", "0.3,0.5,0.5,0.5", *quick_run[at + 2 :], "--out", "anew"]
    assert type_in(*anew).code == 0
    assert frames("out", 4) == frames("anew", 4)
    assert len(list(Path("out/.thumbnails").iterdir())) == 5
    done = type_in(*words, "--iterations", "3", "--resume")
    assert done.code == 2 and "--scales (or --iterations) has 4 items there, 3 here" in done.err


def test_more_frames_at_the_end(type_in: Type, quick_run: list[str]) -> None:
    quick_run = [*quick_run, "--max-frames", "3"]
    assert type_in(*quick_run).code == 0
    first = frames("out", 0)
    longer = with_words(quick_run, "a night", "a sea", "two owls", "a wood")
    done = type_in(*longer, "--resume")
    assert done.code == 0, done.err
    assert "6 frames of 64x64, 3 rounds, 15 of 18 pictures left, about " in done.err
    assert frames("out", 0)[:3] == first
    assert type_in(*longer, "--out", "anew").code == 0
    for iteration in range(3):  # texts are encoded in other groups then, so there may be rounding
        for number in range(6):
            name = f"iteration-{iteration:02d}/frame-{number:03d}.png"
            grown, anew = (np.asarray(read_picture(Path(out, name))).astype(int) for out in ("out", "anew"))
            assert np.abs(grown - anew).max() <= 2, name


def test_another_story_is_refused_as_ever(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run).code == 0
    before = files(Path("out"))
    for words, told in (
        (with_words(quick_run, "--prompt", "a sea"), "story.prompts"),
        ([*with_words(quick_run, "a night", "a sea"), "--steps", "3"], "out holds another run: "),
        ([*quick_run, "--iterations", "3", "--guidance", "4"], "out holds another run: "),
    ):
        done = type_in(*words, "--resume")
        assert done.code == 2 and told in done.err and done.err.count("\n") == 1, done.err
    assert files(Path("out")) == before
