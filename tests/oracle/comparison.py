"""How far two sets of pictures are apart."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def mean_absolute_error(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two RGB pictures of one size, in units of 1 of 255."""
    assert first.size == second.size
    difference = np.asarray(first.convert("RGB"), dtype=np.float64) - np.asarray(second.convert("RGB"))
    return float(np.abs(difference).mean())


def errors_of_frames(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> list[float]:
    """`mean_absolute_error` of each frame of one iteration."""
    return [mean_absolute_error(one, other) for one, other in zip(first, second, strict=True)]
