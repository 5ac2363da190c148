"""A second process holds a GPU's memory."""

import pytest
import torch

from storyadapter.bench.device_memory import only_device_memory
from storyadapter.method.errors import UnavailableError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")


@pytest.mark.alone
def test_no_more_is_left_and_all_is_given_back() -> None:
    before, _ = torch.cuda.mem_get_info(CUDA)
    left = before // 2
    with only_device_memory(left, CUDA):
        free, _ = torch.cuda.mem_get_info(CUDA)
        assert left - 2**30 < free <= left + (2 << 20)
    after, _ = torch.cuda.mem_get_info(CUDA)
    assert after > before - 2**30 // 4


def test_too_little_to_begin_with_is_told() -> None:
    with pytest.raises(UnavailableError, match="GiB are free; expected"), only_device_memory(1 << 50, CUDA):
        pass
