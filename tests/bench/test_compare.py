"""What got slower, on reports made by hand."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from storyadapter.bench import compare
from storyadapter.method.errors import InputError

CASE = {"name": "n16", "references": 16, "frames": 8, "height": 1024, "width": 1024, "rungs": None, "check_steps": 3}
STORY = {"name": "story", "frames": 16, "iterations": 2, "steps": 20, "max_frames": 8, "height": 1024, "width": 1024}
REPORT: dict[str, Any] = {
    "kind": "throughput",
    "environment": {"device": "GPU 1", "power limit": "700 W", "driver": "1.2"},
    "model": "sdxl",
    "precision": "fp16",
    "cases": [CASE],
    "story_cases": [STORY],
    "rungs": [
        {"case": "n16", "rung": "sdpa", "status": "measured", "rows_per_second": 50.0},
        {"case": "n16", "rung": "graphs", "status": "measured", "rows_per_second": 80.0},
        {"case": "n16", "rung": "tensorrt", "status": "not run", "reason": "not installed"},
    ],
    "stories": [{"case": "story", "way": "overlapped", "vae_precision": "bf16", "rows_per_second": 75.0}],
    "undrawn": [],
}


def _changed(**values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), **values}


def _run(tmp_path: Path, after: Any, *words: str, before: Any = REPORT) -> int:
    for name, content in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *words]))


def test_the_same_report_has_nothing_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, REPORT) == 0
    printed = capsys.readouterr().out
    assert "| n16: graphs | 80.00 | 80.00 | +0.0% |" in printed
    assert "| story: overlapped, VAE in bf16 | 75.00 | 75.00 | +0.0% |" in printed
    assert "tensorrt" not in printed and printed.endswith("nothing got slower by more than 3 %\n")


def test_a_slower_rung_is_named_and_a_faster_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = _changed()
    after["rungs"][0]["rows_per_second"] = 60.0
    after["rungs"][1]["rows_per_second"] = 76.0
    assert _run(tmp_path, after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "n16: graphs: slower by 5.0%"
    assert sum("slower" in line for line in lines) == 1
    assert _run(tmp_path, after, "--threshold", "5.1") == 0
    assert _run(tmp_path, after, "--threshold", "4.9") == 1


def test_a_slower_story_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = _changed()
    after["stories"][0]["rows_per_second"] = 60.0
    assert _run(tmp_path, after) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "story: overlapped, VAE in bf16: slower by 20.0%"


def test_a_story_that_failed_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = _changed(stories=[], undrawn=["story: overlapped, VAE in bf16: failed: RuntimeError: broke"])
    assert _run(tmp_path, after) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "story: overlapped, VAE in bf16: failed: RuntimeError: broke"
    assert _run(tmp_path, _changed(stories=[])) == 0


def test_a_rung_that_is_wrong_now_is_lost_and_one_that_was_not_asked_for_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = _changed()
    after["rungs"][1] = {"case": "n16", "rung": "graphs", "status": "wrong", "reason": "12.0 dB"}
    assert _run(tmp_path, after) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "n16: graphs: wrong: 12.0 dB"
    del after["rungs"][1]
    assert _run(tmp_path, after) == 0
    assert "| n16: graphs | 80.00 | - | not measured |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"device": "GPU 2", "power limit": "700 W"}}, "device is GPU 1 in a.json and GPU 2 in b.json"),
        ({"environment": {"device": "GPU 1", "power limit": "350 W"}}, "power limit is 700 W in a.json and 350 W"),
        (
            {"environment": {"device": "GPU 1", "power limit": "700 W", "device memory": "15.5 GiB"}},
            "device memory is not told in a.json and 15.5 GiB in b.json; expected two reports of one device memory",
        ),
        ({"model": "mine"}, "model is sdxl in a.json and mine in b.json"),
        ({"precision": "bf16"}, "precision is fp16 in a.json and bf16 in b.json"),
        (
            {"cases": [{**CASE, "frames": 4}]},
            "case n16 has frames 8 in a.json and 4 in b.json; expected the same cases",
        ),
        ({"story_cases": [{**STORY, "steps": 4}]}, "case story has steps 20 in a.json and 4 in b.json"),
        ({"cases": [], "story_cases": []}, "expected a common one"),
        ({"kind": "soak"}, "b.json is no report of bench throughput"),
    ],
)
def test_what_cant_be_compared_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        _run(tmp_path, _changed(**changes))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_how_rungs_were_chosen_and_compared_doesnt_matter(tmp_path: Path) -> None:
    assert _run(tmp_path, _changed(cases=[{**CASE, "rungs": ["graphs"], "check_steps": 9}])) == 0


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b.json is no report of bench throughput; expected its .json file"):
        _run(tmp_path, [1, 2])
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    (tmp_path / "c.json").write_text("# a page", encoding="utf-8")
    with pytest.raises(InputError, match="c.json is not JSON"):
        compare.run(parser.parse_args([str(tmp_path / "c.json"), str(tmp_path / "a.json")]))
    with pytest.raises(InputError, match="none.json can't be read: No such file"):
        compare.run(parser.parse_args([str(tmp_path / "none.json"), str(tmp_path / "a.json")]))


@pytest.mark.parametrize("text", ["-1", "100", "few"])
def test_a_threshold_is_a_percentage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["a.json", "b.json", "--threshold", text])
    assert "is not a percentage such as 3" in capsys.readouterr().err
