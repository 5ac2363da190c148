"""An error that hides that memory ran out is told as what it is."""

import pytest
import torch

from storyadapter.engine.inductor.networks import as_out_of_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")


def hide(size: int) -> None:
    try:
        torch.ones(size, device="cuda")
    except torch.OutOfMemoryError:
        raise RuntimeError("a call failed") from None
    raise RuntimeError("another call failed")


def test_memory_that_ran_out_is_told() -> None:
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="^a call failed"), as_out_of_memory(CUDA):
            hide(1 << 44)
        with pytest.raises(RuntimeError, match="another call failed") as error, as_out_of_memory(CUDA):
            hide(1)
        assert not isinstance(error.value, torch.OutOfMemoryError)
