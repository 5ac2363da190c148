"""What a machine says that has no NVIDIA driver; one with a GPU is asked in tests/gpu."""

import pytest
import torch

from storyadapter.engine.gpu import driver_version


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
def test_without_a_driver_its_version_is_unknown() -> None:
    assert driver_version() == "unknown"
