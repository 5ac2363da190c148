"""What the judge is trained with: its loss, disturbed pictures, and its file."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor

from storyadapter.demo.judge import Judge


def trait_losses(logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Mean cross-entropy over all traits; labels int64 [n, traits]."""
    return torch.stack([nnf.cross_entropy(part.float(), labels[:, n]) for n, part in enumerate(logits)]).mean()


def blemish(pictures: Tensor) -> Tensor:
    """Blur, noise, shifts of brightness and colour, so that the judge doesn't depend on crisp edges."""
    n, device = len(pictures), pictures.device
    x = pictures.float()
    soft = nnf.avg_pool2d(nnf.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    x = torch.lerp(x, soft, torch.rand(n, 1, 1, 1, device=device) * 0.9)
    coarse = nnf.interpolate(torch.randn(n, 3, 16, 16, device=device), size=x.shape[-2:], mode="bilinear")
    x = x + (torch.randn_like(x) * 12 + coarse * 14) * torch.rand(n, 1, 1, 1, device=device)
    gain = 1 + 0.1 * torch.randn(n, 3, 1, 1, device=device)
    x = (x - 128) * gain + 128 + 6 * torch.randn(n, 3, 1, 1, device=device)
    return x.clamp(0, 255)


def save_judge(judge: Judge, path: Path) -> None:
    """Write the weights in fp16."""
    save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in judge.state_dict().items()}, path)
