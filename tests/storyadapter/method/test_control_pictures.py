"""A user's pictures: every format and shape becomes the frame's, and what can't is told by frame and file."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from storyadapter.method.canny import HIGH, LOW, canny
from storyadapter.method.control import ControlSettings, controlled_calls
from storyadapter.method.control_pictures import read_controls, with_control_images
from storyadapter.method.errors import InputError
from storyadapter.method.picture_files import read_picture_file
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from tests.control_models import poses
from tests.refusals import raises_typed

PLAN = RunPlan(height=64, width=96, seed=0, controls=(ControlSettings(),))


def story(*controls: object) -> Story:
    return Story([{"prompt": "a fox"} | ({} if control is None else {"control": control}) for control in controls])


def test_pictures_are_brought_to_the_frames_size_which_is_told_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, size in enumerate(((96, 64), (64, 64), (200, 30))):
        poses(3, *size)[number].save(paths[number])
    notices: list[object] = []
    first, second, third, none = read_controls(story(*map(str, paths), None), PLAN, notices.append)
    assert none == () and len({picture.key for (picture,) in (first, second, third)}) == 3
    assert {picture.pixels.shape for (picture,) in (first, second, third)} == {(64, 96, 3)}
    assert np.array_equal(second[0].pixels, np.asarray(Image.open(paths[1]).resize((96, 64))))
    told = f"frame 1: the control picture {paths[1]} is 64x64, and 1 more: resized to 96x64, as the frames are"
    assert notices == [told]


def test_what_is_in_a_file_counts(tmp_path: Path) -> None:
    pose = poses(1, 96, 64)[0]
    side = np.tile(np.linspace(0, 65535, 96).astype(np.uint16), (64, 1))
    half = pose.convert("RGBA")
    half.putalpha(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    files = {
        "depth.png": (Image.fromarray(side), side // 257),
        "clear.png": (half, np.zeros((64, 96))),
        "palette.gif": (pose.convert("P"), np.asarray(pose.convert("P").convert("RGB"))),
        "grey.webp": (pose.convert("L"), None),
        "turned.jpg": (pose.rotate(90, expand=True), None),
    }
    for name, (picture, expected) in files.items():
        options = {"exif": exif} if name == "turned.jpg" else {"lossless": True} if name == "grey.webp" else {}
        picture.save(tmp_path / name, **options)
        ((found,),) = read_controls(story(str(tmp_path / name)), PLAN)
        if expected is not None:
            wanted = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2)
            assert np.array_equal(found.pixels, wanted), name
    assert np.abs(found.pixels.astype(int) - np.asarray(pose)).mean() < 20  # JPEG's losses; upright again
    white = read_picture_file(tmp_path / "clear.png", "a", background="white")
    assert np.asarray(white).min() == 255


def test_what_is_wrong_with_a_picture_is_told_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    poses(1, 96, 64)[0].save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:150])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (20_000, 8)).save(tmp_path / "wide.png")
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")
    for name, told in (
        ("gone.png", "gone.png: there is no such file; expected a picture (PNG, JPEG, "),
        ("cut.png", "cut.png can't be read: "),
        ("text.png", "text.png is no picture that can be read; expected a picture"),
        ("folder.png", "folder.png can't be read: Is a directory"),
        ("wide.png", "wide.png has 20,000x8 pixels; expected at most 10,000 a side and 80 million in all"),
        ("large.png", "large.png has 9,500x9,500 pixels; expected at most 10,000 a side and 80 million"),
        ("a\0b.png", "can't be read"),
    ):
        with raises_typed(InputError, r"^frame 1: the control picture .*" + re.escape(told)) as caught:
            read_controls(story(str(good), str(tmp_path / name)), PLAN)
        assert "\n" not in str(caught.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_picture_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = io.BytesIO()
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    poses(1, 16, 16)[0].save(file, form)
    whole = bytearray(file.getvalue())
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=9)):
        whole[place] = byte
    path = tmp_path / "any"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert read_picture_file(path, "it", background="black").mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


def test_pictures_and_controlnets_that_have_no_other(tmp_path: Path) -> None:
    poses(1)[0].save(tmp_path / "0.png")
    path, both = str(tmp_path / "0.png"), RunPlan(height=64, width=64, seed=0, controls=(ControlSettings(),) * 2)
    for control, plan, told in (
        (path, RunPlan(height=64, width=64, seed=0), "frame 0 has a control picture, and there is no ControlNet; exp"),
        (path, both, "frame 0 has 1 control pictures; expected 2: one for each --controlnet, null for none"),
    ):
        with raises_typed(InputError, re.escape(told)):
            read_controls(story(control), plan)
    assert read_controls(story(None, None), PLAN) == ((), ())
    ((none, found),) = read_controls(story([None, path]), both)
    assert none is None and found is not None


def test_a_folder_of_pictures_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("pose 10.png", "pose 9.PNG", "pose 1.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    notices: list[object] = []
    found = with_control_images(story(None, None, None, None), [tmp_path], notices.append)
    names = ("pose 1.jpg", "pose 9.PNG", "pose 10.png")
    assert [frame.control for frame in found.frames] == [*((str(tmp_path / name),) for name in names), None]
    assert len(notices) == 2 and "notes.txt" in str(notices[0]) and "3 pictures for 4 frames" in str(notices[1])
    for frames, folder, told in (
        ((None, None), tmp_path, f"--control-images {tmp_path} has 3 pictures; expected 1 to 2, one per frame"),
        ((None, "a.png"), tmp_path, "--control-images is given, and frame 1 has its own; leave one out"),
        ((None,), tmp_path / "gone", f"--control-images {tmp_path}/gone can't be read: No such file or directory"),
        ((None,), tmp_path / "notes.txt", "can't be read: Not a directory; expected a folder with a picture per frame"),
    ):
        with raises_typed(InputError, re.escape(told)):
            with_control_images(story(*frames), [folder])


def test_the_steps_that_it_takes_part_in_are_diffusers() -> None:
    for steps, share in ((50, (0.0, 1.0)), (50, (0.0, 0.5)), (7, (0.1, 0.9)), (4, (0.3, 1.0)), (4, (0.3, 0.4))):
        keep = [1.0 - float(i / steps < share[0] or (i + 1) / steps > share[1]) for i in range(steps)]
        assert [float(i in controlled_calls(share, steps)) for i in range(steps)] == keep
    assert controlled_calls((0.0, 0.5), 10, skipped=4) == range(0, 1)
    assert not controlled_calls((0.0, 0.3), 10, skipped=4)


def slow_canny(grey: np.ndarray) -> np.ndarray:
    """Pixel by pixel, from the definition."""
    height, width = grey.shape

    def at(y: int, x: int) -> int:
        return int(grey[min(max(y, 0), height - 1), min(max(x, 0), width - 1)])

    def gradient(y: int, x: int) -> tuple[int, int]:
        gx = sum(w * (at(y + d, x + 1) - at(y + d, x - 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        gy = sum(w * (at(y + 1, x + d) - at(y - 1, x + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        return gx, gy

    def size(y: int, x: int) -> int:
        return sum(map(abs, gradient(y, x))) if 0 <= y < height and 0 <= x < width else 0

    ridge = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            gx, gy = gradient(y, x)
            own = size(y, x)
            if abs(gy) < 0.41421356 * abs(gx):
                is_ridge = own > size(y, x - 1) and own >= size(y, x + 1)
            elif abs(gy) > 2.41421356 * abs(gx):
                is_ridge = own > size(y - 1, x) and own >= size(y + 1, x)
            else:
                side = -1 if (gx < 0) != (gy < 0) else 1
                is_ridge = own > size(y - 1, x - side) and own > size(y + 1, x + side)
            ridge[y, x] = own if is_ridge and own > LOW else 0
    edges = ridge > HIGH
    while True:
        around = np.pad(edges, 1)
        near = sum(around[1 + a : 1 + a + height, 1 + b : 1 + b + width] for a in (-1, 0, 1) for b in (-1, 0, 1)) > 0
        grown = near & (ridge > 0)
        if np.array_equal(grown, edges):
            return edges
        edges = grown


@pytest.mark.parametrize("seed", range(3))
def test_canny_is_what_its_definition_gives(seed: int) -> None:
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((48, 36), Image.Resampling.BICUBIC)
    edges = np.asarray(canny(picture))
    expected = slow_canny(np.asarray(picture.convert("L")))
    assert 0.02 < expected.mean() < 0.5
    assert np.array_equal(edges, np.repeat(expected[..., None], 3, 2) * 255)


def test_edges_are_asked_for_in_the_plan(tmp_path: Path) -> None:
    poses(1, 96, 64)[0].save(tmp_path / "0.png")
    plan = RunPlan(height=64, width=96, seed=0, controls=(ControlSettings(preprocess="canny"),))
    ((edges,),), ((pose,),) = (read_controls(story(str(tmp_path / "0.png")), each) for each in (plan, PLAN))
    assert edges.key != pose.key and {0, 255} == set(np.unique(edges.pixels))
    assert np.array_equal(edges.pixels, np.asarray(canny(Image.open(tmp_path / "0.png"))))
