"""A server for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from storyadapter import Checkpoint, StoryPipeline, api
from storyadapter.bench.served import served
from storyadapter.serve.gate import Keys
from tests.storyadapter.serve.serving import LIMITS


@pytest.fixture(scope="package")
def pipeline(checkpoint: Checkpoint) -> StoryPipeline:
    return api.open_checkpoint(checkpoint, backend="eager")


@pytest.fixture(scope="package")
def address(pipeline: StoryPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(pipeline, tmp_path_factory.mktemp("server"), LIMITS, pixels=64, max_frames=None) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    path = tmp_path / "keys"
    path.write_text(
        "# two keys, of which these are the hashes\n"
        "ada:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n"
        "bo:35224d0d3465d74e855f8d69a136e79c744ea35a675d3393360a327cbf6359a2 # secret2\n"
    )
    return Keys(path)
