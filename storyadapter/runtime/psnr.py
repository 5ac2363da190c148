"""How far pictures are from those they should be, as peak signal-to-noise ratio (PSNR)."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from PIL import Image

EQUAL: Final = 100.0  # dB of equal pictures, whose ratio is infinite
# What half precision may cost, with the same references: the median of many pictures, and the worst of them.
MIN_MEDIAN_PSNR: Final = 40.0
MIN_PSNR: Final = 34.0


def decibels(error: float, peak: float) -> float:
    """dB of a mean square error, of signals up to `peak`; `EQUAL` at the most, nan of nan."""
    return EQUAL if error == 0 else min(-10 * math.log10(error / peak**2), EQUAL)


def psnr(found: Image.Image, expected: Image.Image) -> float:
    """dB, of 255; `EQUAL` at the most."""
    return decibels(float(np.square(np.asarray(found, dtype=np.float64) - np.asarray(expected)).mean()), 255)


def psnr_of_each(found: Iterable[Image.Image], expected: Iterable[Image.Image]) -> list[float]:
    """dB of every picture; see `psnr`."""
    return [psnr(one, two) for one, two in zip(found, expected, strict=True)]


def passes(values: Sequence[float]) -> bool:
    """Whether these frames are as near as half precision must bring them."""
    return statistics.median(values) >= MIN_MEDIAN_PSNR and min(values) >= MIN_PSNR


def in_words(values: Sequence[float]) -> str:
    """ "median 47.1 dB, worst 41.3 dB"."""
    return f"median {statistics.median(values):.1f} dB, worst {min(values):.1f} dB"
