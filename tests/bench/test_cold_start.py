"""The benchmark of a start, on a toy model without an engine."""

from pathlib import Path

import pytest

from storyadapter.bench.cold_start import build_parser
from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.main import run_program


def test_starts_of_a_model_that_was_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), "--size", "toy", "--backend", "eager", "--pixels", "64", "--steps", "1", "--runs", "1"]
    assert run_program(build_parser(), words) == 0
    told = capfd.readouterr().out
    assert "| part | run 1 |" in told
    assert {"python", "imports", "model files", "together"} <= {line.split(" | ")[0][2:] for line in told.splitlines()}
    model = tmp_path / "model"
    Checkpoint.open(
        base_model=model, image_encoder=model / "image_encoder", ip_adapter=model / "ip-adapter.safetensors"
    )


def test_a_command_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert run_program(build_parser(), [str(tmp_path), "--backend", "eager", "--pixels", "64"]) == 1
    assert "storyadapter-trt: error: build failed: storyadapter-trt: error: " in capsys.readouterr().err
