from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from PIL import Image, ImageChops, ImageSequence, ImageStat

from storyadapter.output.animation import FRAMES_AT_MOST, PIXELS_AT_MOST, Form, animation, extent


def drawn(pictures: list[Image.Image], form: Form = "gif") -> Image.Image:
    shown = extent(f"story.{form}", pictures[0].size, len(pictures))
    with ThreadPoolExecutor(2) as workers:
        return Image.open(BytesIO(animation(form, shown, lambda frame: pictures[frame], workers)))


def shaded(color: str, size: tuple[int, int] = (256, 192)) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, color), Image.new("RGB", size, "white"), ramp)


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_frames_last_800_milliseconds_each_and_look_like_their_pictures(form: Form) -> None:
    pictures = [shaded(color) for color in ("red", "green", "blue", "orange")]
    with drawn(pictures, form) as moving:
        assert (moving.format, moving.n_frames) == (form.upper(), 4)
        assert moving.info["loop"] == 0  # for ever
        for picture, frame in zip(pictures, ImageSequence.Iterator(moving), strict=True):
            frame.load()
            assert frame.info["duration"] == 800
            shown = frame.convert("RGB").resize(picture.size, Image.Resampling.BOX)
            difference = ImageStat.Stat(ImageChops.difference(shown, picture)).mean
            assert max(difference) < 3  # of 255; a shared or web palette gives above 10


def test_large_pictures_shrink() -> None:
    with drawn([shaded("red", (1024, 768))]) as moving:
        assert moving.size == (512, 384)


def test_equal_frames_keep_their_time() -> None:
    picture = shaded("red")
    with drawn([picture, picture, shaded("blue")]) as moving:
        total = sum(frame.info["duration"] for frame in ImageSequence.Iterator(moving))
    assert total == pytest.approx(2400)


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (1344, 768), (32, 2048)])
@pytest.mark.parametrize("frames", [1, 16, 100, 201, 500, 10_000])
def test_an_animation_can_be_sent_on(frames: int, size: tuple[int, int]) -> None:
    shown = extent("story.gif", size, frames)
    assert len(set(shown.frames)) == len(shown.frames) == min(frames, FRAMES_AT_MOST)
    assert shown.frames[0] == 0 and shown.frames[-1] == frames - 1
    assert len(shown.frames) * shown.size[0] * shown.size[1] <= PIXELS_AT_MOST
    usual = extent("story.gif", size, 1).size
    assert bool(shown.notice) == (frames > FRAMES_AT_MOST or frames * usual[0] * usual[1] > PIXELS_AT_MOST)
    if (frames, size) == (500, (64, 64)):
        assert shown.notice == "story.gif shows 200 of 500 frames, 320x320, so that it can be sent on"
    if (frames, size) == (100, (1024, 1024)):
        assert shown.notice == "story.gif is small, 489x489, so that it can be sent on"
