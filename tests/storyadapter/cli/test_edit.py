"""`edit`: some frames of a finished run again, beside all others as they were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storyadapter
from storyadapter.method.events import FrameFinished
from storyadapter.output.edits import Edit
from storyadapter.output.frame_files import read_picture
from tests.oracle.comparison import errors_of_frames
from tests.oracle.published_method import load_published_model, published_frame
from tests.storyadapter.cli.running import Type, files, pictures

TIGHT = 0.05  # of 255, as of every frame beside an oracle's
FRAMES, ITERATIONS = 3, 3


def record(out: str = "out") -> dict[str, Any]:
    return json.loads(Path(out, "story.json").read_text(encoding="utf-8"))


def frame(out: str, iteration: int, number: int) -> Path:
    return Path(out, f"iteration-{iteration:02d}/frame-{number:03d}.png")


def rows(done: Any) -> int:
    (plan,) = (event for event in done.events if event["event"] == "plan")
    return plan["unet_rows"]


@pytest.fixture
def drawn(type_in: Type, quick_run: list[str]) -> int:
    """A finished run in `out`; its rows."""
    done = type_in(*quick_run, "--json-log")
    assert done.code == 0, done.err
    return rows(done)


def test_one_frame_is_drawn_again_beside_the_others_as_they_were(type_in: Type, drawn: int, tiny_model_dir) -> None:
    before = files(Path("out"))
    done = type_in("edit", "out", "--frame", "1", "--prompt", "two red foxes", "--json-log")
    assert done.code == 0, done.err
    assert rows(done) * FRAMES == drawn
    assert files(Path("out")) == before
    after = files(Path("out-edited"))
    assert after.keys() == before.keys()
    for name in before:
        if name.startswith(("iteration-", "frames/")):
            assert (after[name] != before[name]) == name.endswith("001.png"), name
    (edit,) = record("out-edited")["edits"]
    assert edit == {"frames": [1], "older": [0, 2], "before": ["an owl"], "kept": None}
    assert record("out-edited")["identity"]["story"]["prompts"] == ["a fox", "two red foxes", "a night"]
    assert record("out-edited")["progress"]["status"] == "finished"

    # each new picture is what the published method draws from the others as they were, and its own predecessor
    adapter = tiny_model_dir / "ip-adapter.safetensors"
    model = load_published_model(tiny_model_dir, tiny_model_dir / "image_encoder", adapter)
    negative = record()["identity"]["plan"]["negative_prompt"]
    drawing = dict(steps=2, seed=7, height=64, width=64, guidance=5.0, negative_prompt=negative)
    for iteration, scale in enumerate((0.0, 0.3, 0.5)):
        references = [read_picture(frame("out-edited", iteration - 1, n)) for n in range(FRAMES) if iteration]
        expected = published_frame(model, "two red foxes", references, scale, **drawing)
        assert max(errors_of_frames([read_picture(frame("out-edited", iteration, 1))], [expected])) < TIGHT
        stale = [read_picture(frame("out", iteration - 1, n)) for n in range(FRAMES) if iteration]
        if iteration:
            wrong = published_frame(model, "two red foxes", stale, scale, **drawing)
            assert max(errors_of_frames([read_picture(frame("out-edited", iteration, 1))], [wrong])) > 10 * TIGHT


def test_in_place_keeps_the_old_frames_and_edits_add_up(type_in: Type, drawn: int) -> None:
    before = files(Path("out"))
    assert (
        type_in("edit", "out", "--frame", "1", "--seed", "11", "--frame", "2", "--negative", "", "--in-place").code == 0
    )
    after = files(Path("out"))
    for iteration in range(ITERATIONS):
        for number in range(FRAMES):
            name = f"iteration-{iteration:02d}/frame-{number:03d}.png"
            assert (after[name] == before[name]) == (number == 0)
            assert after.get(f"before-edit-01/{name}") == (before[name] if number else None)
    assert type_in("edit", "out", "--frame", "0", "--in-place").code == 0  # nothing new, but it sees the others now
    last = files(Path("out"))
    assert last["iteration-00/frame-000.png"] == before["iteration-00/frame-000.png"]
    assert last["iteration-01/frame-000.png"] != before["iteration-01/frame-000.png"]
    assert last["iteration-02/frame-001.png"] == after["iteration-02/frame-001.png"]
    edits = record()["edits"]
    assert [(edit["frames"], edit["older"], edit["kept"]) for edit in edits] == [
        ([1, 2], [0], "before-edit-01"),
        ([0], [1, 2], "before-edit-02"),
    ]
    assert record()["identity"]["story"]["prompts"][1] == {"prompt": "an owl", "seed": 11}


def test_what_follows_is_a_story_drawn_anew(type_in: Type, quick_run: list[str], drawn: int) -> None:
    done = type_in("edit", "out", "--frame", "1", "--prompt", "a sea", "--all-iterations")
    assert done.code == 0, done.err
    assert "round 1 of 3" in done.err
    quick_run[quick_run.index("an owl")] = "a sea"
    assert type_in(*quick_run, "--out", "anew").code == 0
    assert pictures(Path("out-edited")) == pictures(Path("anew"))
    assert record("out-edited")["edits"] == []


def test_an_edit_that_was_stopped_is_gone_on_with(type_in: Type, drawn: int) -> None:
    words = ("edit", "out", "--frame", "1", "--prompt", "a sea")
    assert type_in(*words, "--out", "whole").code == 0
    edit = Edit.of(Path("out"), {1: {"prompt": "a sea"}})
    edit.begin(edit.identity(), Path("part"))
    frame("part", 1, 1).write_bytes(frame("whole", 1, 1).read_bytes())
    refused = type_in("run", "--story", "part/story.json", "--out", "part", "--resume")
    assert refused.code == 2
    done = type_in("edit", "part", "--resume", "--json-log")
    assert done.code == 0, done.err
    assert pictures(Path("part")) == pictures(Path("whole"))
    again = type_in("edit", "part", "--resume")
    assert again.code == 2 and "part holds no edit that was stopped" in again.err


def test_the_last_frames_serve_where_older_ones_were_removed(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--keep", "last").code == 0
    before = files(Path("out"))
    done = type_in("edit", "out", "--frame", "1", "--prompt", "a sea")
    assert done.code == 0, done.err
    after = files(Path("out-edited"))
    assert after.keys() == before.keys()
    changed = {name for name in before if name.endswith(".png") and "frame" in name and after[name] != before[name]}
    assert changed == {"iteration-02/frame-001.png", "frames/001.png"}
    sheets = [np.asarray(read_picture(Path(out, "contact-sheet.png"))) for out in ("out", "out-edited")]
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).any()


def test_frames_that_start_from_themselves(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--steps", "4", "--strength", "0.5").code == 0
    done = type_in("edit", "out", "--frame", "1", "--prompt", "a sea")
    assert done.code == 0, done.err
    assert frame("out", 2, 0).read_bytes() == frame("out-edited", 2, 0).read_bytes()
    assert frame("out", 2, 1).read_bytes() != frame("out-edited", 2, 1).read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--frame", "3", "--prompt", "x"], "--frame is 3; expected 0 to 2"),
        (["--frame", "x"], "'x' is not a frame's number"),
        (["--prompt", "x"], "--prompt without a frame; expected --frame N before it"),
        (["--frame", "1", "--prompt", "x", "--prompt", "y"], "--prompt is given twice for one frame"),
        (["--frame", "1", "--frame", "1"], "--frame 1 is given twice"),
        ([], "nothing to change in out; expected --frame N"),
        (["--frame", "1"], "frame 1 would be drawn as it is; expected another --prompt, --negative, --seed or --c"),
        (["--frame", "1", "--prompt", " "], "is only white space"),
        (["--frame", "1", "--seed", "-1"], "the seed of prompt 2 is -1, expected 0 to 2^63 - 1"),
        (["--frame", "1", "--prompt", "x", "--out", "out"], "out already holds a run"),
        (["--frame", "1", "--prompt", "x", "--precision", "bf16"], "precision is 'fp32' there, 'bf16' here"),
        (["--resume", "--frame", "1"], "--resume goes on with an edit as it was begun"),
    ],
)
def test_what_can_not_be_edited_is_told_in_a_line(type_in: Type, drawn: int, words: list[str], told: str) -> None:
    before = files(Path("."))
    done = type_in("edit", "out", *words)
    assert done.code == 2
    assert told in done.err and done.err.count("\n") == 1, done.err
    assert files(Path(".")) == before


def test_folders_that_can_not_be_edited(type_in: Type, drawn: int) -> None:
    words = ("--frame", "1", "--prompt", "x")

    def refused(told: str, folder: str = "out") -> None:
        before = files(Path("."))
        done = type_in("edit", folder, *words)
        assert done.code == 2
        assert told in done.err and done.err.count("\n") == 1, done.err
        assert files(Path(".")) == before

    refused("no-such: there is no such folder", "no-such")
    stored = Path("out/story.json").read_text()
    Path("out/story.json").write_text(stored.replace('"schema": 4', '"schema": 3'))
    refused("has schema 3, expected 4: another version of storyadapter-trt wrote it")
    Path("out/story.json").write_text(stored.replace('"status": "finished"', '"status": "running"'))
    refused("holds a run that isn't finished; go on with it by --resume")
    Path("out/story.json").write_text(stored.replace('"a night"', "7"))
    refused("story.json holds no story that can be drawn")
    Path("out/story.json").write_text(stored)
    picture = frame("out", 1, 0)
    data = picture.read_bytes()
    picture.write_bytes(data[:-20])
    refused("out/iteration-01/frame-000.png isn't what was written")
    picture.write_bytes(data)
    assert type_in("edit", "out", *words).code == 0


def test_from_python(type_in: Type, drawn: int, tiny_model_dir) -> None:
    parts = tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors"
    assert type_in("edit", "out", "--frame", "1", "--prompt", "a sea", "--out", "typed").code == 0
    pipeline = storyadapter.open(*parts, backend="eager")
    events = storyadapter.edit(pipeline, "out", {1: "a sea"}, out="called")
    assert [event.frame for event in events if isinstance(event, FrameFinished)] == [1] * ITERATIONS
    assert pictures(Path("called")) == pictures(Path("typed"))
    with pytest.raises(storyadapter.InputError, match="frame is 9"):
        storyadapter.edit(pipeline, "out", {9: "a sea"}, out="other")
    pipeline.model = "another"
    with pytest.raises(storyadapter.InputError, match="was drawn by another model"):
        storyadapter.edit(pipeline, "out", {1: "a sea"}, out="other")
    assert not Path("other").exists()
