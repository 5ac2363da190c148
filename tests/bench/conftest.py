"""What several benchmarks' tests share."""

from dataclasses import replace
from pathlib import Path

import pytest

from storyadapter.demo.training.networks import TINY, write_random_model


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose pictures have the size that the judge reads. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_model(folder, config=replace(TINY, pixels=128))
    return folder
