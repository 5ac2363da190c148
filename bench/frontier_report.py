"""The page, the data and the chart of `bench frontier`."""

from collections.abc import Sequence
from math import log10
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from storyadapter.bench.frontier_run import BALANCED_COST, KEPT, Frontier, Measured
from storyadapter.bench.quality_run import LOSS_AT_MOST
from storyadapter.bench.report import opening, table

_HEADER: Final = (
    *("mode", "UNet rows per frame", "cost", "s/frame", "consistency", "against exact"),
    *("fidelity", "against exact", "PSNR to exact, dB"),
)


def markdown(found: Frontier) -> str:
    """The page."""
    settings = found.settings
    text = (
        "Stories of characters that the model was never trained on, drawn in each mode with the same seeds, and read "
        "by the demo model's judge in the last iteration. Consistency: how often two frames of a story agree in an "
        "identity trait. Fidelity: frames that show species, action and place as prompted. Intervals are 95 % by "
        "bootstrap over stories; against exact: of the differences, story by story. Cost: UNet rows of a frame over "
        "all iterations, of the exact mode's; s/frame: seconds of drawing all stories together on this device, over "
        "their frames, beside other processes where several share the drawing. PSNR: median over the frames of the "
        "last iteration; two characters that differ in one trait already have a low one.",
        "",
    )
    lines = opening("Cost against quality", found.environment | settings, *text)
    lines += [f"## {settings['stories']} stories to choose by, {settings['seeds']} seeds each", ""]
    lines += [*table(_HEADER, map(_row, found.measured)), ""]
    lines += [f"## {settings['others']} other stories, {settings['seeds']} seeds each", ""]
    lines += [*table(_HEADER, map(_row, found.confirmed)), "", "## Presets", ""]
    rules = {
        "balanced": f"the cheapest of which neither measure falls by more than {LOSS_AT_MOST} at the lower end of its "
        f"interval, at {BALANCED_COST:.0%} of the cost or less",
        "fast": f"the cheapest that keeps {KEPT:.0%} of both",
    }
    for choice in found.choices:
        result = "no mode" if choice.mode is None else choice.mode
        verdict = "" if choice.mode is None else f", {'' if choice.confirmed else 'not '}confirmed on the other stories"
        lines.append(f"- {choice.preset} ({rules[choice.preset]}; without the LoRA): **{result}**{verdict}")
    return "\n".join([*lines, ""])


def _row(one: Measured) -> Sequence[object]:
    gained = [f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for e in (one.consistency_gained, one.fidelity_gained)]
    return (
        *(one.mode, one.rows, f"{one.cost:.3f}", f"{one.seconds_per_frame:.3f}", one.consistency, gained[0]),
        *(one.fidelity, gained[1], "-" if one.psnr is None else f"{one.psnr:.1f}"),
    )


_PANEL, _HEIGHT, _MARGIN, _LINE, _HEAD = 620, 460, 70, 24, 90
_INK, _FAINT, _GRID = (32, 33, 36), (112, 116, 122), (226, 228, 231)
_OWN, _LORA, _CHOSEN = (38, 98, 186), (214, 110, 20), (20, 130, 70)


def chart(found: Frontier) -> Image.Image:
    """Cost, on a logarithmic axis, against consistency and against fidelity, with intervals; modes by number."""
    modes = found.measured
    lines = -(-len(modes) // 2)
    image = Image.new("RGB", (2 * _PANEL + _MARGIN, _HEAD + _HEIGHT + 70 + lines * _LINE + 30), "white")
    drawing, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    drawing.text((_MARGIN, 18), "Cost against quality on held-out stories", _INK, ImageFont.load_default(26))
    where = f"{found.settings['model']}, {found.settings['backend']} {found.settings['precision']}"
    drawing.text((_MARGIN, 54), f"{where}, {found.environment.get('device', '')}", _FAINT, font)
    chosen = {choice.mode for choice in found.choices if choice.confirmed}
    for number, name in enumerate(("consistency", "fidelity")):
        _panel(drawing, _MARGIN + number * _PANEL, name, modes, chosen)
    for number, one in enumerate(modes):
        x = _MARGIN + (number // lines) * _PANEL
        y = _HEAD + _HEIGHT + 60 + (number % lines) * _LINE
        presets = [choice.preset for choice in found.choices if choice.confirmed and choice.mode == one.mode]
        label = f"{number}  {one.mode}, {one.cost:.1%}" + "".join(f"  ({preset})" for preset in presets)
        drawing.text((x, y), label, _colour(one, chosen), font)
    return image


def _colour(one: Measured, chosen: set[str | None]) -> tuple[int, int, int]:
    if one.cost == 1:
        return _INK
    return _CHOSEN if one.mode in chosen else _LORA if one.lora else _OWN


def _panel(
    drawing: ImageDraw.ImageDraw, left: int, name: str, modes: Sequence[Measured], chosen: set[str | None]
) -> None:
    """One measure: its axis ends below the worst interval."""
    font, width, bottom = ImageFont.load_default(16), _PANEL - _MARGIN - 20, _HEAD + _HEIGHT
    values = [getattr(one, name) for one in modes]
    low = int(min(0.95, *(value.low for value in values)) * 20) / 20
    cheapest = min(one.cost for one in modes) / 1.2

    def x(cost: float) -> float:
        return left + width * log10(cost / cheapest) / log10(1.1 / cheapest)

    def y(value: float) -> float:
        return bottom - _HEIGHT * (value - low) / (1.0 - low)

    step = 0.05 if low >= 0.5 else 0.1
    for tick in range(round((1 - low) / step) + 1):
        value = 1 - tick * step
        drawing.line((left, y(value), left + width, y(value)), _GRID)
        drawing.text((left - 46, y(value) - 9), f"{value:.2f}", _FAINT, font)
    for cost in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if cost >= cheapest:
            drawing.line((x(cost), _HEAD, x(cost), bottom), _GRID)
            drawing.text((x(cost) - 14, bottom + 6), f"{cost:.0%}", _FAINT, font)
    drawing.text((left, bottom + 28), f"{name} over cost", _INK, font)
    for number, (one, value) in enumerate(zip(modes, values, strict=True)):
        colour = _colour(one, chosen)
        drawing.line((x(one.cost), y(value.low), x(one.cost), y(value.high)), colour)
        at = x(one.cost), y(value.mean)
        drawing.ellipse((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5), colour)
        drawing.text((at[0] + 7, at[1] - 17), str(number), colour, font)
