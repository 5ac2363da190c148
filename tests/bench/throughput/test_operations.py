"""The operations of a UNet call, against numbers found by hand."""

import pytest
import torch

from storyadapter.bench.synthetic import SDXL, TOY, SyntheticCheckpoint, SyntheticModel
from storyadapter.bench.throughput.kernel_classes import attended_keys, count_operations
from storyadapter.engine.eager.networks import open_eager
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics


def _networks(model: SyntheticModel, device: str, controlnets: int = 0) -> Networks:
    checkpoint = SyntheticCheckpoint(model, torch.device(device), controlnets=controlnets)
    return open_eager(checkpoint, Numerics("fp32"), torch.device(device), lambda name: None)


@pytest.fixture(scope="module")
def toy() -> Networks:
    return _networks(TOY, "cpu")


def test_keys_by_hand() -> None:
    assert attended_keys(2, 3) == 2 * (77 + 4) + 2 * (77 + 12)


def test_a_reference_more_costs_its_keys(toy: Networks) -> None:
    """The toy has 3 layers of 32 channels with 16 queries, and 4 layers of 64 channels with 4 queries."""
    fewer, more = (count_operations(toy, 2, references, 64, 64) for references in (3, 4))
    assert more - fewer == 4 * (2 * 4) * (3 * 16 * 32 + 4 * 4 * 64)


def test_a_frame_more_costs_what_one_costs(toy: Networks) -> None:
    one, three = (count_operations(toy, frames, 3, 64, 64) for frames in (1, 3))
    embeddings = 2 * (32 * 128 + 128 * 128)  # of the time step, per row
    assert three == 3 * one and one > 2 * embeddings


def test_the_device_doesnt_matter(toy: Networks) -> None:
    assert count_operations(toy, 2, 3, 64, 96) == count_operations(_networks(TOY, "meta"), 2, 3, 64, 96)


def test_a_controlnet_takes_0_44_of_sdxls_unet_more() -> None:
    networks = _networks(SDXL, "meta", controlnets=1)
    plain, controlled = (count_operations(networks, 1, 16, 1024, 1024, controlled=each) for each in (False, True))
    assert plain == count_operations(_networks(SDXL, "meta"), 1, 16, 1024, 1024)
    assert controlled / plain == pytest.approx(1.437, abs=0.002)


def test_sdxl_takes_7_tera_operations_per_row_at_1024() -> None:
    per_row = count_operations(_networks(SDXL, "meta"), 1, 16, 1024, 1024) / 2
    assert per_row == pytest.approx(6.72e12, rel=0.01)
