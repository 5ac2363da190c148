"""A throughput report as a picture: rows per second of every rung, as bars."""

from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

_WIDTH: Final = 1200
_MARGIN: Final = 32
_LABELS: Final = 260  # left of the bars
_VALUES: Final = 120  # right of the longest bar
_BAR: Final = 26
_LINE: Final = 38
_HEAD: Final = 62  # above the bars of a case
_TITLE_SIZE, _TEXT_SIZE = 26, 18
_INK: Final = (32, 33, 36)
_FAINT: Final = (112, 116, 122)
_OWN: Final = (38, 98, 186)
_BASELINE: Final = (170, 174, 180)


def chart(data: dict[str, Any]) -> Image.Image:
    """A bar per rung that was measured, a group of bars per case; baselines are grey.

    Args:
        data: the report's JSON data.
    """
    groups = []
    for case in data["cases"]:
        rungs = [r for r in data["rungs"] if r["case"] == case["name"] and "rows_per_second" in r]
        if rungs:
            title = f"N = {case['references']}, {case['width']}x{case['height']}, {case['frames']} frames at once"
            groups.append((title, rungs))
    title_font, font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_TEXT_SIZE)
    height = 2 * _MARGIN + 2 * _LINE + sum(_HEAD + _LINE * len(rungs) for _, rungs in groups)
    image = Image.new("RGB", (_WIDTH, height), "white")
    drawing = ImageDraw.Draw(image)
    device = data["environment"].get("device", "")
    drawing.text((_MARGIN, _MARGIN), "UNet rows per second", _INK, title_font)
    drawing.text((_MARGIN, _MARGIN + _LINE), f"{data['model']}, {data['precision']}, {device}", _FAINT, font)
    y = _MARGIN + 2 * _LINE
    most = max((rung["rows_per_second"] for _, rungs in groups for rung in rungs), default=1.0)
    room = _WIDTH - 2 * _MARGIN - _LABELS - _VALUES
    for title, rungs in groups:
        drawing.text((_MARGIN, y + _HEAD - _LINE), title, _INK, font)
        y += _HEAD
        for rung in rungs:
            length = max(1, round(room * rung["rows_per_second"] / most))
            left = _MARGIN + _LABELS
            drawing.text((_MARGIN + 12, y), rung["rung"], _FAINT if rung["baseline"] else _INK, font)
            drawing.rectangle((left, y, left + length, y + _BAR), fill=_BASELINE if rung["baseline"] else _OWN)
            drawing.text((left + length + 10, y), f"{rung['rows_per_second']:.1f}", _INK, font)
            y += _LINE
    return image
