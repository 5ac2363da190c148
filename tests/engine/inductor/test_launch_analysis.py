"""PyTorch's analysis of Triton launches is remembered where it must be the same, and nowhere else."""

from typing import Any

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from storyadapter.engine.inductor.launch_analysis import ANALYSES, analysed_once, launch_key


def symbol() -> torch.SymInt:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    size = mode.from_tensor(torch.empty(5, 7)).shape[0]
    assert isinstance(size, torch.SymInt)
    return size


def test_this_pytorch_has_the_analysis() -> None:
    """If none is found, builds take minutes longer without a word."""
    assert any(hasattr(triton_kernel_wrap, name) for name in ANALYSES)


def test_what_the_analysis_reads_is_the_key() -> None:
    half, whole = torch.empty(2, dtype=torch.float16), torch.empty(3)
    key = launch_key({"x": half, "n": 3, "BLOCK": 64}, {})
    assert key == launch_key({"x": torch.empty(9, 9, dtype=torch.float16), "n": 3, "BLOCK": 64}, {})
    for other in (
        {"x": whole, "n": 3, "BLOCK": 64},
        {"x": half, "n": 1, "BLOCK": 64},
        {"x": half, "n": 3, "BLOCK": 32},
        {"y": half, "n": 3, "BLOCK": 64},
        {"x": half, "n": 3, "BLOCK": 64.0},
        {"x": half, "n": symbol(), "BLOCK": 64},
    ):
        assert launch_key(other, {}) != key
    assert launch_key({"x": half, "n": 3, "BLOCK": 64}, {"x": ("stable", ([8, 64],))}) != key
    assert launch_key({"n": symbol()}, {}) == launch_key({"n": symbol()}, {})


def test_a_launch_is_analysed_once_and_only_inside() -> None:
    name = next(name for name in ANALYSES if hasattr(triton_kernel_wrap, name))
    original = getattr(triton_kernel_wrap, name)
    kernel = object()

    def analyse(**kwargs: Any) -> Any:
        # of no kernel of Triton's, PyTorch supposes that every tensor is written
        return getattr(triton_kernel_wrap, name)(kernel, kwargs, {})

    first, second = analyse(x=torch.empty(2), n=3), analyse(x=torch.empty(2), n=3)
    assert first is not second
    with analysed_once():
        one, other = analyse(x=torch.empty(2), n=3), analyse(y=torch.empty(2), n=3)
        assert repr(one) == repr(first) and repr(other) != repr(first)
        again = analyse(x=torch.empty(5), n=3)
        assert repr(again) == repr(first) and again is not one
        assert getattr(triton_kernel_wrap, name) is not original
    assert getattr(triton_kernel_wrap, name) is original


def test_an_error_leaves_the_analysis_as_it_was() -> None:
    before = [getattr(triton_kernel_wrap, name, None) for name in ANALYSES]
    with pytest.raises(RuntimeError), analysed_once():
        raise RuntimeError
    assert before == [getattr(triton_kernel_wrap, name, None) for name in ANALYSES]
