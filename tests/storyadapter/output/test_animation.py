from io import BytesIO

import pytest
from PIL import Image, ImageChops, ImageSequence, ImageStat

from storyadapter.output.overview import gif


def shaded(color: str, size: tuple[int, int] = (256, 192)) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, color), Image.new("RGB", size, "white"), ramp)


def test_frames_last_800_milliseconds_each_and_look_like_their_pictures() -> None:
    pictures = [shaded(color) for color in ("red", "green", "blue", "orange")]
    with Image.open(BytesIO(gif(pictures))) as animation:
        assert animation.n_frames == 4
        assert animation.info["loop"] == 0  # for ever
        for picture, frame in zip(pictures, ImageSequence.Iterator(animation), strict=True):
            assert frame.info["duration"] == 800
            shown = frame.convert("RGB").resize(picture.size, Image.Resampling.BOX)
            difference = ImageStat.Stat(ImageChops.difference(shown, picture)).mean
            assert max(difference) < 3  # of 255; a shared or web palette gives above 10


def test_large_pictures_shrink() -> None:
    with Image.open(BytesIO(gif([shaded("red", (1024, 768))]))) as animation:
        assert animation.size == (512, 384)


def test_equal_frames_keep_their_time() -> None:
    picture = shaded("red")
    with Image.open(BytesIO(gif([picture, picture, shaded("blue")]))) as animation:
        total = sum(frame.info["duration"] for frame in ImageSequence.Iterator(animation))
    assert total == pytest.approx(2400)
