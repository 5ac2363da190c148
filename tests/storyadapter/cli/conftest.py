"""The program, called in this process, on the tiny model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storyadapter.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Standard output of `--json-log`."""
        return [json.loads(line) for line in self.out.splitlines()]


Type = Callable[..., Done]


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is typed in an empty folder, and remembers weights in a cache of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def type_in(capfd: pytest.CaptureFixture[str]) -> Iterator[Type]:
    """Type a command of storyadapter-trt."""

    def call(*words: str | Path) -> Done:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capfd.readouterr())

    yield call


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


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    """Every picture of a run, byte by byte."""
    return {name: data for name, data in files(folder).items() if name.endswith((".png", ".gif"))}
