"""The list of experiments: each is a command of this project, with options that it has."""

import os
import subprocess
from pathlib import Path

import pytest

from storyadapter.__main__ import build_parser

SCRIPT = Path(__file__).parents[2] / "bench" / "experiments.sh"
# Takes the place of both programs: notes what it was called with; one experiment fails.
RECORDER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$RECORD"
case "$*" in *"bench quality --backend inductor --precision fp16"*) echo broken; exit 3;; esac
"""


def run_script(tmp_path: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    programs, record = tmp_path / "programs", tmp_path / "record"
    programs.mkdir()
    for name in ("storyadapter-trt", "python"):
        (programs / name).write_text(RECORDER, encoding="utf-8")
        (programs / name).chmod(0o755)
    record.touch()
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(record)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    return done, record.read_text(encoding="utf-8").splitlines()


def test_every_experiment_is_a_command_with_options_that_exist(tmp_path: Path) -> None:
    done, called = run_script(tmp_path, "out")
    assert done.returncode == 1 and done.stderr.strip() == "failed: quality; see out/NAME.log"
    commands = [line.split()[1:] for line in called if line.startswith("storyadapter-trt ")]
    assert (
        len(commands) == len(called) - 4 >= 8
    )  # pytest, the kernels' tuning, and what bench has as programs of its own
    for words in commands:
        build_parser().parse_args(words)
    assert (tmp_path / "out" / "quality.log").read_text(encoding="utf-8") == "broken\n"
    assert "== tests: python -m pytest -q tests/gpu" in done.stdout


def test_only_those_that_are_named(tmp_path: Path) -> None:
    done, called = run_script(tmp_path, "out", "kernel", "soak")
    assert done.returncode == 0
    assert [line.split()[2] for line in called] == ["soak", "kernel"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "names: tests parity quality quality-fp8 frontier throughput"),
        (("--help",), "All that this project measures on a GPU"),
        (("out", "kernels"), "kernels isn't an experiment; expected some of tests parity"),
    ],
)
def test_what_it_says(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done, called = run_script(tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr and not called
    assert not (tmp_path / "out").exists()
