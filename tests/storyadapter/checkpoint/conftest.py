"""A copy of the tiny model that a test may spoil, and the checkpoint of the whole one."""

import shutil
from pathlib import Path

import pytest

from storyadapter.checkpoint import Checkpoint
from tests.storyadapter.checkpoint.spoil import tiny_paths


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model_dir: Path) -> Checkpoint:
    return Checkpoint.open(tiny_paths(tiny_model_dir))
