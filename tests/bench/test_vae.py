"""The time that a decode takes: the whole command with a toy, on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from storyadapter.bench.vae import build_parser
from storyadapter.cli.main import run_program

WORDS = ("--synthetic-weights", "toy", "--pixels", "64", "--precisions", "fp8")


def test_a_quantized_decoder_calibrates_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storyadapter.engine.inductor.backend._why_no_fp8", lambda: "")  # it compiles the emulation
    monkeypatch.setattr("storyadapter.bench.vae.default_device", lambda: torch.device("cpu"))
    assert run_program(build_parser(), [*WORDS, "--out", str(tmp_path / "vae")]) == 0
    (path,) = tmp_path.glob("**/*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["measured"]
    assert [one["precision"] for one in found] == ["fp8"] * 3
    assert found[1]["error_to_eager"] < 0.1
    for one in found:
        assert one["finite"] and 1e-3 < one["error"] < 0.3  # rounded, and no other picture
    (page,) = tmp_path.glob("**/*.md")
    assert page.read_text(encoding="utf-8").count("| fp8 |") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_that_cannot_is_told_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(build_parser(), list(WORDS)) == 2
    told = capsys.readouterr()
    assert "it can't run the VAE in fp8 on cpu; expected a CUDA GPU of compute capability 8.9 or later" in told.err
    assert not told.out and len(told.err.strip().splitlines()) == 1
