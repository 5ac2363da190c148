"""Sheets of drawn stories to look at."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Write pictures uint8 [rows, columns, 3, H, W] as one sheet."""
    rows, columns, _, height, width = pictures.shape
    grid = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(grid.contiguous().numpy()).save(path)
