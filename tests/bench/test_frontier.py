"""The frontier chooses by its rules, draws each mode once, and its modes are plans of any number of iterations."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.bench import frontier
from storyadapter.bench.frontier_modes import EXACT, MODES
from storyadapter.bench.frontier_run import Measured
from storyadapter.bench.quality_run import Estimate
from storyadapter.demo.training.networks import TINY, write_random_model
from storyadapter.method.constants import reference_scales
from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan
from storyadapter.method.presets import PRESETS


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    frontier.add_arguments(parser)
    return parser.parse_args(words)


def measured(**changes: Estimate) -> Measured:
    whole = Estimate(0.9, 0.88, 0.92)
    none = Estimate(0.0, -0.01, 0.01)
    return replace(Measured("mode", 10, 0.1, 1.0, whole, whole, none, none, 20.0, lora=False), **changes)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_every_mode_is_a_plan_and_none_costs_more_than_exact(iterations: int) -> None:
    plans = {name: RunPlan(seed=0, **mode.plan_settings(iterations)) for name, mode in MODES.items()}
    assert plans[EXACT] == RunPlan(seed=0, scales=plans[EXACT].scales)
    rows = {name: plan.unet_rows(1) for name, plan in plans.items()}
    assert all(rows[name] < rows[EXACT] for name in MODES if name != EXACT and not MODES[name].iterations)
    assert len(MODES) > 10


def test_a_mode_keeps_all_only_if_neither_measure_may_have_fallen() -> None:
    assert measured().keeps_all
    fallen = Estimate(-0.01, -0.03, 0.01)
    assert not measured(consistency_gained=fallen).keeps_all and not measured(fidelity_gained=fallen).keeps_all


def test_a_mode_keeps_most_by_the_means_alone() -> None:
    exact = measured()
    assert measured(consistency=Estimate(0.86, 0.5, 0.9)).keeps_most(exact)
    assert not measured(fidelity=Estimate(0.85, 0.8, 0.9)).keeps_most(exact)


def test_stories_are_drawn_once_and_the_report_tells_every_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random_model(tmp_path / "model", config=replace(TINY, pixels=128))
    words = ["--model", str(tmp_path / "model"), "--modes", "dpmpp 8, interval; 10 steps", "--iterations", "1"]
    words += ["--stories", "2", "--others", "2", "--frames", "2", "--seeds", "1", "--work", str(tmp_path / "work")]
    assert frontier.run(arguments(*words, "--only-draw", "confirm")) == 0
    others = tmp_path / "work" / "dpmpp-8-interval-others.npz"
    assert others.is_file() and not (tmp_path / "work" / "exact.npz").exists()
    before = others.stat().st_mtime_ns
    frontier.run(arguments(*words, "--out", str(tmp_path / "report")))
    assert others.stat().st_mtime_ns == before
    page, data = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert page in capsys.readouterr().out
    assert [one["mode"] for one in data["measured"]] == ["exact", "dpmpp 8, interval", "10 steps"]
    assert [round(one["cost"], 2) for one in data["measured"]] == [1, 0.13, 0.2]
    assert data["measured"][0]["psnr"] == 100 and data["measured"][1]["psnr"] < 60
    assert data["measured"][0]["consistency_gained"] == {"mean": 0, "low": 0, "high": 0}
    assert [choice["preset"] for choice in data["choices"]] == ["balanced", "fast"]
    assert "| dpmpp 8, interval | 26 | 0.130 |" in page
    assert Image.open(tmp_path / "report.png").width > 1000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--modes", "none"], "--modes has 'none'; expected some of exact; "),
        (["--model", "nowhere"], "--model nowhere: no model_index.json there"),
        (["--lora", "nowhere"], "--lora nowhere: no such file"),
        (["--modes", "exact", "--only-draw", "choose"], "--only-draw without --work; expected a folder"),
        (["--modes", "exact", "--frames", "999"], "--frames is 999; expected 56 or fewer"),
        (["--seeds", "0"], "--seeds is 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_told(words: list[str], told: str) -> None:
    with pytest.raises(InputError) as caught:
        frontier.run(arguments(*words))
    assert str(caught.value).startswith(told)


def test_the_script_draws_every_mode_once_and_then_reports(tmp_path: Path) -> None:
    programs, record = tmp_path / "programs", tmp_path / "record"
    programs.mkdir()
    scripts = {"storyadapter-trt": 'echo "$*" >> "$RECORD"', "python": f'exec {sys.executable} "$@"'}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(record)}
    command = ["bash", str(Path(frontier.__file__).with_name("frontier.sh"))]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("usage: frontier.sh FOLDER PROCESSES [OPTION")
    subprocess.run([*command, str(tmp_path / "out"), "3", "--seeds", "1"], check=True, env=environment)
    *drawn, last = record.read_text().splitlines()
    begin = f"bench frontier --seeds 1 --work {tmp_path}/out/work"
    assert last == f"{begin} --out {tmp_path}/out/frontier"
    expected = [f"{begin} --only-draw choose --modes {mode}" for mode in MODES]
    assert sorted(drawn) == sorted([*expected, f"{begin} --only-draw confirm --modes {EXACT}"])


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_a_preset_is_the_mode_that_was_measured(preset: str) -> None:
    report = json.loads((Path(frontier.__file__).parent / "results" / "frontier-h200.json").read_text())
    (choice,) = (choice for choice in report["choices"] if choice["preset"] == preset)
    assert choice["confirmed"]
    settings = MODES[choice["mode"]].plan_settings(report["settings"]["iterations"])
    published = {"scales": reference_scales(report["settings"]["iterations"])}
    assert settings == {**published, **PRESETS[preset].settings}
