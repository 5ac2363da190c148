"""What is told and recorded of frames that are decoded again."""

import json
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.output.run_record import RunRecord
from tests.storyadapter.cli.running import Type, pictures
from tests.storyadapter.cli.test_run import valid
from tests.storyadapter.runtime.test_decoding_again import scaled


@pytest.fixture
def words(tiny_model_dir: Path, quick_run: list[str], tmp_path: Path) -> list[str]:
    """A run whose VAE overflows fp16 for every frame."""
    model = scaled(tiny_model_dir, tmp_path / "model", 30_000)
    asked = ("--base-model", str(model), "--vae-precision", "fp16", "--iterations", "1", "--steps", "1")
    return [*quick_run, *asked]


def again(folder: str) -> list[tuple[int, ...]]:
    return [iteration.decoded_again for iteration in RunRecord.read(Path(folder) / "story.json").iterations]


def test_one_line_per_iteration_and_the_record(type_in: Type, words: list[str]) -> None:
    done = type_in(*words)
    assert done.code == 0
    told = [line for line in done.err.splitlines() if "not finite" in line]
    line = "warning: iteration {}: the VAE gave values that are not finite for frames 0, 1, 2, decoded again in fp32"
    assert told == [line.format(0), line.format(1)]
    assert again("out") == [(0, 1, 2), (0, 1, 2)]
    whole = pictures(Path("out"))
    # a run that was killed when all but one frame of the last iteration were written
    record = json.loads(Path("out/story.json").read_text())
    record["progress"]["iterations"].pop()
    Path("out/story.json").write_text(json.dumps(record))
    Path("out/iteration-01/frame-001.png").unlink()
    assert type_in(*words, "--resume").code == 0
    assert again("out") == [(0, 1, 2), (0, 1, 2)] and pictures(Path("out")) == whole
    assert Image.open("out/iteration-01/frame-000.png").text["decoded again in"] == "fp32"


def test_in_json_lines(type_in: Type, words: list[str]) -> None:
    events = valid(type_in(*words, "--json-log").events)
    assert [e["decoded_again"] for e in events if e["event"] == "frame_finished"] == [True] * 6
    assert [e["decoded_again"] for e in events if e["event"] == "iteration_finished"] == [[0, 1, 2]] * 2


def test_an_edit_keeps_what_is_recorded_of_the_others(type_in: Type, words: list[str]) -> None:
    assert type_in(*words).code == 0
    assert type_in("edit", "out", "--frame", "1", "--prompt", "the sea", "--out", "new").code == 0
    assert again("new") == [(0, 1, 2), (0, 1, 2)]
