"""What the driver tells of a GPU."""

import re
import time

import pytest
import torch

from storyadapter.bench.environment import describe, watch
from storyadapter.engine.gpu import NvidiaGpu, driver_version

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda", 0)


def test_driver_and_limits_are_told() -> None:
    assert re.fullmatch(r"[0-9.]+", driver_version())
    found = describe(DEVICE, "abc")
    assert found["driver"] == driver_version() and found["commit"] == "abc"
    assert re.fullmatch(r"\d+\.\d\d W", found["power limit"]) and re.fullmatch(r"\d+ MHz", found["highest SM clock"])


def test_load_is_sampled_while_the_gpu_works() -> None:
    gpu = NvidiaGpu.of(DEVICE)
    assert gpu is not None
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.float16)
    with watch(DEVICE) as load:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            a @ a
            torch.cuda.synchronize()
    assert len(load.watts) == len(load.clocks_mhz) >= 4
    assert 0 < load.as_data()["sm_clock_mhz"] <= gpu.highest_sm_clock
    assert 0 < load.as_data()["watts"] < 1.2 * gpu.power_limit
