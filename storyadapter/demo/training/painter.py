"""Antialiased flat shapes on a square picture: Pillow at a multiple of the size, reduced by a box filter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZE = 128
OVERSAMPLING = 3
INK: Colour = (52, 40, 48)
_CIRCLE = [(math.cos(2 * math.pi * k / 32), math.sin(2 * math.pi * k / 32)) for k in range(32)]


def shade(colour: Colour, factor: float) -> Colour:
    """The colour darkened (factor below 1) or lightened towards white (above 1)."""
    if factor <= 1:
        red, green, blue = (round(c * factor) for c in colour)
    else:
        red, green, blue = (round(c + (255 - c) * (factor - 1)) for c in colour)
    return red, green, blue


class Painter:
    """Draws in units of final pixels, in the current frame (shift, rotation, scale, mirror)."""

    def __init__(self, background: Colour) -> None:
        side = SIZE * OVERSAMPLING
        self._image = Image.new("RGB", (side, side), background)
        self._draw = ImageDraw.Draw(self._image)
        s = float(OVERSAMPLING)
        self._frame = (s, 0.0, 0.0, 0.0, s, 0.0)

    @contextmanager
    def frame(self, x: float, y: float, angle: float = 0, scale: float = 1, mirror: bool = False) -> Iterator[None]:
        """Draw around (x, y) of the present frame, turned clockwise by `angle` degrees."""
        a, b, c, d, e, f = before = self._frame
        cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
        flip = -1 if mirror else 1
        self._frame = (
            (a * cos + b * sin) * flip,
            b * cos - a * sin,
            a * x + b * y + c,
            (d * cos + e * sin) * flip,
            e * cos - d * sin,
            d * x + e * y + f,
        )
        yield
        self._frame = before

    def polygon(self, points: Sequence[Point], fill: Colour, outline: float = 0) -> None:
        """A filled polygon; `outline` is the width of an ink line around it in the frame's units."""
        placed = self._place(points)
        self._draw.polygon(placed, fill=fill)
        if outline:
            self._draw.line(
                [*placed, placed[0], placed[1]], fill=self._ink(fill), width=self._width(outline), joint="curve"
            )

    def smooth(self, points: Sequence[Point], fill: Colour, outline: float = 0) -> None:
        """A closed curve through the points (Catmull-Rom)."""
        n = len(points)
        curve: list[Point] = []
        for k in range(n):
            (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (points[(k + j - 1) % n] for j in range(4))
            for t in (0.0, 0.2, 0.4, 0.6, 0.8):
                w = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
                x = (w[0] * x0 + w[1] * x1 + w[2] * x2 + w[3] * x3) / 2
                y = (w[0] * y0 + w[1] * y1 + w[2] * y2 + w[3] * y3) / 2
                curve.append((x, y))
        self.polygon(curve, fill, outline)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, outline: float = 0, angle: float = 0
    ) -> None:
        """A filled ellipse, turned clockwise by `angle` degrees."""
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        points = [(x + rx * u * cos - ry * v * sin, y + rx * u * sin + ry * v * cos) for u, v in _CIRCLE]
        self.polygon(points, fill, outline)

    def line(self, points: Sequence[Point], width: float, fill: Colour, outline: float = 0) -> None:
        """A line of round ends."""
        placed = self._place(points)
        for colour, extra in ((self._ink(fill), outline), (fill, 0)) if outline else ((fill, 0.0),):
            thick = self._width(width + 2 * extra)
            self._draw.line(placed, fill=colour, width=thick, joint="curve")
            r = thick / 2 - 0.5
            for x, y in (placed[0], placed[-1]):
                self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def picture(self) -> Image.Image:
        """The picture at its final size."""
        return self._image.reduce(OVERSAMPLING)

    def _place(self, points: Sequence[Point]) -> list[Point]:
        a, b, c, d, e, f = self._frame
        return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]

    def _width(self, width: float) -> int:
        a, _, _, d, _, _ = self._frame
        return max(1, round(width * math.hypot(a, d)))

    @staticmethod
    def _ink(fill: Colour) -> Colour:
        red, green, blue = (round(0.35 * c * 0.5 + 0.65 * i) for c, i in zip(fill, INK, strict=True))
        return red, green, blue
