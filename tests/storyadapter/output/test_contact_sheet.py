from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from storyadapter.method.errors import InputError, spelled
from storyadapter.output.lettering import OWN_FONT, Lettering
from storyadapter.output.overview import MAX_PIXELS, Row, contact_sheet, fit, join, scaled, thumbnail_size

COLORS = ["red", "green", "blue", "yellow", "cyan", "magenta"]


def sheet(frames: int, iterations: int, size: tuple[int, int] = (256, 256), caption: str = "a cat", title=None):
    small = thumbnail_size(size, frames, iterations)
    rows = []
    for iteration in range(iterations):
        colors = [COLORS[(frame + iteration) % len(COLORS)] for frame in range(frames)]
        strip = join([Image.new("RGB", small, color) for color in colors])
        rows.append(Row(strip, f"iteration {iteration}", "text only"))
    return contact_sheet(rows, [caption] * frames, title)


def runs(line: list[tuple[int, int, int]]) -> list[tuple[tuple[int, int, int], int]]:
    found: list[tuple[tuple[int, int, int], int]] = []
    for color in line:
        if found and found[-1][0] == color:
            found[-1] = (color, found[-1][1] + 1)
        else:
            found.append((color, 1))
    return found


def test_a_row_per_iteration_and_a_column_per_frame() -> None:
    page = sheet(3, 2, title="Cats")
    full = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
    names = {value: name for name, value in full.items()}
    # The row of pixels through the top of each row of thumbnails shows their colors in order, 256 pixels each.
    data, stride = page.tobytes(), 3 * page.width
    lines = [runs([tuple(data[x : x + 3]) for x in range(y * stride, (y + 1) * stride, 3)]) for y in range(page.height)]
    seen = [[(names[color], count) for color, count in line if color in names] for line in lines]
    first = [("red", 256), ("green", 256), ("blue", 256)]
    second = [("green", 256), ("blue", 256), ("yellow", 256)]
    assert seen.count(first) == seen.count(second) == 256
    assert seen.index(first) < seen.index(second)
    assert page.getpixel((0, 0)) == page.getpixel((page.width - 1, page.height - 1)) == (255, 255, 255)


def ink(page: Image.Image, box: tuple[int, int, int, int]) -> int:
    return sum(page.crop(box).convert("L").histogram()[:200])


def test_title_labels_and_captions_are_drawn_where_they_can_be() -> None:
    page, bare = sheet(2, 1, title="Cats"), sheet(2, 1)
    assert page.height > bare.height
    assert ink(page, (0, 0, page.width, 70)) > 0
    assert ink(bare, (0, 32, 150, 288)) > 0  # the row's label
    assert ink(bare, (150, 288, bare.width, bare.height)) > 0


LETTERS = "é ñ ß — Привет שלום مرحبا λ …"


def test_letters_are_drawn_in_any_script_or_told(tmp_path: Path) -> None:
    lettering = Lettering()
    assert lettering.lacking([LETTERS, "a\u0301 \u200d\n"]) == ""
    lettering._system = []  # as on a machine with no fonts of its own
    assert lettering.lacking(["\u6211 and \u4eec", "\u6211"]) == "\u6211\u4eec"
    assert spelled(lettering.notice(["\u6211s"])) == (
        "no font here has \u6211 (U+6211): in pictures they are boxes; give a font that has them with font"
    )
    assert not lettering.notice([LETTERS])
    shown, boxes = (sheet(1, 1, caption=text, title=text) for text in ("Привет", "\u6211" * 6))
    assert ink(shown, (0, 0, shown.width, 70)) > 0 and ink(boxes, (0, 0, boxes.width, 70)) > 0
    file = tmp_path / "font.ttf"
    file.write_bytes(b"no font")
    with pytest.raises(InputError, match="can't be opened as a font; expected a .ttf, .otf or .ttc file"):
        Lettering(file)
    assert Lettering(OWN_FONT).width("ab", 20) == lettering.width("ab", 20)


def test_lines_end_where_their_script_lets_them() -> None:
    lettering = Lettering()
    chinese = lettering.wrap("\u6211\u4eec\u5728\u68ee\u6797\u91cc" * 4, 60, 14, 9)
    assert len(chinese) > 2 and "".join(chinese) == "\u6211\u4eec\u5728\u68ee\u6797\u91cc" * 4
    words = "one two three four five six seven"
    lines = lettering.wrap(words, 80, 14, 9)
    assert " ".join(lines) == words and all(lettering.fits(line, 80, 14) for line in lines)
    assert lettering.wrap("x" * 1_000_000, 80, 14, 4)[-1].endswith("…")


def test_long_captions_stay_in_their_columns() -> None:
    long, endless = sheet(3, 1, caption="word " * 100), sheet(3, 1, caption="w" * 500)
    for page in (long, endless):
        assert page.height < 256 + 200
        for column in range(1, 3):
            left = 160 + column * 264 - 8
            assert ink(page, (left, 288, left + 8, page.height)) == 0


@pytest.mark.parametrize("frames", [1, 6, 31, 100, 1000])
@pytest.mark.parametrize("size", [(1024, 1024), (1344, 768), (64, 128)])
def test_thumbnails_of_long_stories_shrink(frames: int, size: tuple[int, int]) -> None:
    width, height = thumbnail_size(size, frames, 11)
    assert max(width, height) <= 256
    assert 160 + frames * width <= MAX_PIXELS
    assert 11 * height <= MAX_PIXELS
    if min(width, height) >= 32:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.05)
    if frames <= 6:
        assert max(width, height) == 256


@pytest.mark.parametrize(("frames", "iterations"), [(1, 1), (100, 11), (2, 100), (400, 3)])
def test_sheets_stay_within_what_viewers_open(frames: int, iterations: int) -> None:
    page = sheet(frames, iterations, (96, 160))
    assert page.mode == "RGB"
    assert max(page.size) <= MAX_PIXELS


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(1, 600))
@example(1, 1155, 599.9999999999999)
def test_fit(width: int, height: int, bound: float) -> None:
    fitted = fit((width, height), bound)
    assert 1 <= max(fitted) <= bound
    if max(width, height) <= bound:
        factor = fitted[0] // width
        assert fitted == (factor * width, factor * height)
        assert max(fitted) + max(width, height) > bound  # the largest whole number
    else:
        assert max(fitted) > bound - 1.01


def test_scaled_keeps_colors() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    picture.paste("blue", (32, 0, 64, 64))
    large = scaled(picture, (256, 256))
    assert large.getcolors() == [(32768, (255, 0, 0)), (32768, (0, 0, 255))]
    small = scaled(picture, (16, 16))
    assert small.getpixel((2, 2)) == (255, 0, 0)
    assert small.getpixel((13, 13)) == (0, 0, 255)
