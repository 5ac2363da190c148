"""A server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from storyadapter import Checkpoint, StoryPipeline, api
from storyadapter.bench.served import served
from tests.storyadapter.serve.serving import LIMITS


@pytest.fixture(scope="package")
def pipeline(checkpoint: Checkpoint) -> StoryPipeline:
    return api.open_checkpoint(checkpoint, backend="eager")


@pytest.fixture(scope="package")
def address(pipeline: StoryPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(pipeline, tmp_path_factory.mktemp("server"), LIMITS, pixels=64, max_frames=None) as address:
        yield address
