"""Group norms that read a channels-last picture in the order in which it lies in memory.

A group's channels are 4 to 80 neighbours in memory and its positions lie far apart, so a reduction over a group reads
in small pieces. Summed over the positions of one row first, channel by channel, the reads are as long as a row of
channels, and what is left to sum is small. A compiler fuses the second pass with what stands around it.
"""

import torch
from torch import Tensor, nn


class RowwiseGroupNorm(nn.Module):
    """`torch.nn.GroupNorm` by sums over rows, in fp32: mean and mean square, and the variance from both."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w], channels-last for speed → [B, C, h, w], dtype of x."""
        batch, channels, height, width = x.shape
        values = x.permute(0, 2, 3, 1).float()
        count = height * width * (channels // self.groups)
        mean = self._over_groups(values.sum(2)) / count
        mean_square = self._over_groups((values * values).sum(2)) / count
        deviation = torch.rsqrt((mean_square - mean * mean).clamp(min=0) + self.eps)
        # [B, groups, C / groups]: what the values of a channel are multiplied by, and what is added then
        factor = deviation[:, :, None] * self.weight.float().unflatten(0, (self.groups, -1))
        shift = self.bias.float().unflatten(0, (self.groups, -1)) - mean[:, :, None] * factor
        result = values * factor.flatten(1)[:, None, None] + shift.flatten(1)[:, None, None]
        return result.to(x.dtype).permute(0, 3, 1, 2)

    def _over_groups(self, rows: Tensor) -> Tensor:
        """Sums of rows [B, h, C] → sums of groups [B, groups]."""
        return rows.sum(1).unflatten(1, (self.groups, -1)).sum(2)


def rewrite_group_norms(module: nn.Module) -> None:
    """Put `RowwiseGroupNorm` in place of every group norm of a module."""
    for name, norm in [(name, part) for name, part in module.named_modules() if isinstance(part, nn.GroupNorm)]:
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).register_module(child, RowwiseGroupNorm(norm))
