"""Group norms by sums over rows are PyTorch's."""

import pytest
import torch
from torch import Tensor, nn

from storyadapter.engine.inductor.group_norm import RowwiseGroupNorm, rewrite_group_norms


def norm_of(groups: int, channels: int, dtype: torch.dtype) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def reference(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    values = x.double().reshape(len(x), norm.num_groups, -1)
    normed = (values - values.mean(2, keepdim=True)) * (values.var(2, correction=0, keepdim=True) + norm.eps).rsqrt()
    return normed.reshape(x.shape) * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (1, 64, 1, 1), (3, 96, 5, 7), (1, 320, 33, 2)])
def test_it_is_a_group_norm(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    norm = norm_of(32, shape[1], dtype)
    x = (torch.randn(shape) * 3 + 5).to(dtype).to(memory_format=layout)
    with torch.no_grad():
        found = RowwiseGroupNorm(norm)(x)
        expected = reference(norm, x)
    assert found.shape == x.shape and found.dtype == dtype
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_a_mean_far_from_zero_costs_little() -> None:
    torch.manual_seed(0)
    norm = norm_of(32, 64, torch.float32)
    x = torch.randn(1, 64, 64, 64) + 100
    with torch.no_grad():
        expected = reference(norm, x)
        assert float((RowwiseGroupNorm(norm)(x) - expected).norm() / expected.norm()) < 2e-3


def test_what_does_not_vary_gives_the_bias() -> None:
    norm = norm_of(32, 32, torch.float32)
    with torch.no_grad():
        found = RowwiseGroupNorm(norm)(torch.full((1, 32, 4, 4), 0.1))
    assert torch.allclose(found, norm.bias.detach()[None, :, None, None].expand_as(found), atol=0.2)
    assert found.isfinite().all()


def test_every_group_norm_of_a_module_is_rewritten() -> None:
    module = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ModuleDict({"norm": nn.GroupNorm(8, 32)}), nn.GroupNorm(4, 32))
    names = set(module.state_dict())
    rewrite_group_norms(module)
    assert not any(isinstance(part, nn.GroupNorm) for part in module.modules())
    assert set(module.state_dict()) == names
