"""The judge: a small classifier that reads every trait off a picture.

It is trained on drawings of the world alone and shares nothing with the demo model's networks, so what it says of
their pictures is not the model's own opinion.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor, nn

from storyadapter.demo.vocabulary import TRAITS

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Pictures uint8 or float [n, 3, 128, 128] in 0 … 255 to one row of logits per trait, in the order of `TRAITS`."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 72, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in widths:
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            previous = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.Conv2d(previous, previous, 4)  # 4 × 4 positions at 128 pixels
        self.heads = nn.Linear(previous, sum(map(len, TRAITS.values())))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        x = self.features(pictures.to(self.heads.weight.dtype) / 127.5 - 1)
        logits = self.heads(nnf.relu(self.pool(x).flatten(1)))
        return logits.split([len(values) for values in TRAITS.values()], dim=1)

    @torch.no_grad()
    def read(self, pictures: Tensor, batch: int = 512) -> Tensor:
        """Labels of pictures [n, 3, 128, 128] in 0 … 255: int64 [n, traits]."""
        device = self.heads.weight.device
        rows = [torch.stack([t.argmax(1) for t in self(part.to(device))], 1) for part in pictures.split(batch)]
        return torch.cat(rows).cpu()


def load_judge(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> Judge:
    """Load the shipped judge in fp32, ready to read."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.float().eval().to(device)
