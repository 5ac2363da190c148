"""Checks of an acceptance that need a GPU; all of TensorRT's where a TensorRT runs on it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storyadapter.checkpoint import CheckpointPaths
from storyadapter.engine.acceptance import run_checks
from storyadapter.engine.backends import BACKENDS
from storyadapter.engine.trial import Trial, TrialError, compare_interleaved, compare_repeated, compare_streams
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.networks import Network
from tests.engine.wrong_networks import Changed, wrong

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    size = Range(64, 64)
    return Trial("eager", tmp_path, CheckpointPaths.given(None, None, None), ShapeRanges(2, 8, size, size))


def test_eager_keeps_the_order_of_streams(trial: Trial) -> None:
    for check in (compare_repeated, compare_interleaved, compare_streams):
        check(trial)


def test_a_network_that_waits_for_nothing_is_seen(trial: Trial) -> None:
    side = torch.cuda.Stream()

    def change(name: str, network: Network) -> Network:
        class Unordered(Changed):
            def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
                with torch.cuda.stream(side):
                    return self.network(inputs)

        return Unordered(network) if name == "denoiser" else network

    with pytest.raises(TrialError, match="a call didn't keep the order of its stream$"):
        compare_streams(wrong(trial, change))


@pytest.mark.timeout(3600)
def test_tensorrt_is_accepted(tmp_path: Path) -> None:
    backend = BACKENDS["tensorrt"]
    if why := backend.why_it_cant_run() or backend.why_unavailable(to_build=True):
        pytest.skip(why)
    plan = backend.acceptance_plan(tmp_path)
    assert [outcome for outcome in run_checks(plan.checks, plan.trial) if not outcome.passed] == []
