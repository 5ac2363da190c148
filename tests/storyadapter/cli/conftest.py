"""The program, called in this process, on the tiny model."""

import re
from pathlib import Path

import pytest

from storyadapter.__main__ import main
from tests.storyadapter.cli.running import Done, Type


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is typed in an empty folder, and remembers weights in a cache of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def type_in(capfd: pytest.CaptureFixture[str]) -> Type:
    """Type a command of storyadapter-trt."""

    def call(*words: str | Path) -> Done:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Done(code, out, re.sub(r"(?m)^\.\.\. .*\n", "", err))  # what a slow machine has time to tell

    return call


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> list[str]:
    """The three model options."""
    return [
        "--base-model",
        str(tiny_model_dir),
        "--image-encoder",
        str(tiny_model_dir / "image_encoder"),
        "--ip-adapter",
        str(tiny_model_dir / "ip-adapter.safetensors"),
    ]


@pytest.fixture
def quick_run(tiny_model: list[str]) -> list[str]:
    """A run of three frames and three iterations, as quick as can be; words typed after it override it."""
    return [
        "run",
        *tiny_model,
        *("--prompt", "a fox", "an owl", "a night"),
        *("--style", "none", "--backend", "eager", "--precision", "fp32"),
        *("--steps", "2", "--iterations", "2", "--seed", "7", "--out", "out"),
    ]
