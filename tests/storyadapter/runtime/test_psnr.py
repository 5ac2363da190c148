"""PSNR of pictures whose error is known."""

import pytest
from PIL import Image

from storyadapter.runtime.psnr import EQUAL, psnr, psnr_of_each

BLACK, GREY = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))


def test_an_error_of_a_fifth_is_14_db() -> None:
    assert psnr(GREY, BLACK) == psnr(BLACK, GREY) == pytest.approx(13.979, abs=1e-3)
    assert psnr(GREY, GREY) == EQUAL


def test_pictures_are_compared_one_by_one() -> None:
    assert psnr_of_each([BLACK, GREY], [BLACK, GREY]) == [EQUAL, EQUAL]
    assert psnr_of_each([BLACK, BLACK], [BLACK, GREY]) == [EQUAL, pytest.approx(13.979, abs=1e-3)]


def test_pictures_that_have_no_counterpart_are_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        psnr_of_each([BLACK], [BLACK, GREY])
