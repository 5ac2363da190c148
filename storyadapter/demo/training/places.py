"""Draws the places of the world: a background that fills the picture, with room for a character in the middle."""

from __future__ import annotations

import math
from random import Random

from storyadapter.demo.training.painter import SIZE, Colour, Painter, shade

GROUND = 112.0  # where the character's feet are

_SKY: dict[str, Colour] = {
    "forest": (168, 214, 176),
    "beach": (150, 216, 246),
    "mountain": (188, 216, 240),
    "room": (250, 222, 178),
    "night": (28, 32, 84),
    "desert": (252, 196, 130),
    "meadow": (176, 226, 250),
    "sea": (34, 132, 178),
}


def sky(place: str) -> Colour:
    """The colour that the picture starts with."""
    return _SKY[place]


def draw_place(painter: Painter, place: str, random: Random) -> None:
    """Draw a place; its details (positions of trees, stars …) come from `random`."""
    _DRAW[place](painter, random)


def _forest(p: Painter, r: Random) -> None:
    for x in range(-6, 136, 17):
        x0 = x + r.uniform(-5, 5)
        p.polygon([(x0 - 3, 100), (x0 - 2, 0), (x0 + 2, 0), (x0 + 3, 100)], (116, 158, 124))
    for x in (r.uniform(2, 14), r.uniform(28, 42), r.uniform(88, 100), r.uniform(114, 126)):
        width = r.uniform(4.5, 6.5)
        p.polygon([(x - width, 108), (x - width * 0.7, 0), (x + width * 0.7, 0), (x + width, 108)], (112, 76, 50))
    for k in range(9):
        p.ellipse(k * 16 + r.uniform(-5, 5), r.uniform(-4, 9), 15, r.uniform(12, 17), (44, 128 - (k % 3) * 14, 62))
    p.polygon([(0, 94), (40, 90), (90, 95), (128, 91), (128, 128), (0, 128)], (72, 136, 66))
    for _ in range(3):
        x, y = r.choice((r.uniform(4, 30), r.uniform(98, 124))), r.uniform(112, 122)
        p.line([(x, y + 4), (x, y)], 3, (250, 240, 224))
        p.ellipse(x, y - 1, 5, 3.4, (216, 50, 44))


def _beach(p: Painter, r: Random) -> None:
    p.ellipse(r.choice((r.uniform(10, 30), r.uniform(98, 118))), r.uniform(12, 22), 10, 10, (255, 226, 80))
    p.polygon([(0, 62), (128, 62), (128, 100), (0, 100)], (38, 146, 206))
    for _ in range(5):
        x, y = r.uniform(0, 128), r.uniform(67, 84)
        p.line([(x - 6, y), (x, y - 1.5), (x + 6, y)], 1.6, (200, 236, 250))
    p.smooth([(-10, 96), (30, 91), (64, 95), (100, 90), (138, 95), (138, 140), (-10, 140)], (246, 220, 158))
    p.line([(0, 93), (30, 89), (64, 93), (100, 88), (128, 92)], 2.4, (252, 252, 248))
    x, lean = r.choice(((r.uniform(4, 14), 6), (r.uniform(114, 124), -6)))
    p.line([(x, 112), (x + lean * 0.4, 80), (x + lean, 48)], 5, (150, 108, 66))
    for angle in (-160, -125, -55, -20, 20, 160):
        u, v = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        top = (x + lean, 48)
        p.smooth(
            [top, (top[0] + 12 * u + 2, top[1] + 12 * v - 4), (top[0] + 23 * u, top[1] + 19 * v + 5)], (40, 150, 80)
        )
    p.ellipse(r.uniform(20, 108), r.uniform(118, 124), 4, 3, (250, 150, 130))


def _mountain(p: Painter, r: Random) -> None:
    for x, top, colour in ((r.uniform(14, 40), 28, (122, 140, 176)), (r.uniform(86, 116), 16, (104, 122, 162))):
        p.polygon([(x - 56, 104), (x, top), (x + 56, 104)], colour)
        snow = [(x, top), (x + 17, top + 25), (x + 8, top + 20), (x, top + 28), (x - 8, top + 20), (x - 17, top + 25)]
        p.polygon(snow, (250, 252, 255))
    p.smooth([(-10, 98), (24, 90), (64, 96), (104, 88), (138, 96), (138, 140), (-10, 140)], (240, 246, 252))
    for x in (r.uniform(3, 16), r.uniform(112, 125)):
        for k in range(3):
            w, y = 7 + 3 * k, 74 + 10 * k
            p.polygon([(x - w, y + 11), (x, y - 6), (x + w, y + 11)], (36, 96, 92))
        p.polygon([(x - 6, 72), (x, 64), (x + 6, 72)], (250, 252, 255))
    for _ in range(22):
        p.ellipse(r.uniform(0, 128), r.uniform(0, 126), 1.5, 1.5, (255, 255, 255))


def _room(p: Painter, r: Random) -> None:
    for x in range(-4, 140, 16):
        p.polygon([(x, 0), (x + 7, 0), (x + 7, 94), (x, 94)], (246, 206, 156))
    p.polygon([(0, 92), (128, 92), (128, 128), (0, 128)], (176, 116, 74))
    p.polygon([(0, 90), (128, 90), (128, 94), (0, 94)], (252, 244, 230))
    x = r.choice((r.uniform(14, 24), r.uniform(104, 114)))
    p.polygon([(x - 17, 14), (x + 17, 14), (x + 17, 58), (x - 17, 58)], (252, 250, 244), 1)
    p.polygon([(x - 13, 18), (x + 13, 18), (x + 13, 54), (x - 13, 54)], (140, 206, 246))
    p.line([(x, 18), (x, 54)], 2.4, (252, 250, 244))
    p.line([(x - 13, 36), (x + 13, 36)], 2.4, (252, 250, 244))
    lamp = 128 - x + r.uniform(-3, 3)
    p.line([(lamp, 100), (lamp, 52)], 2.6, (96, 76, 66))
    p.polygon([(lamp - 13, 56), (lamp - 7, 36), (lamp + 7, 36), (lamp + 13, 56)], (255, 170, 90), 1)
    p.ellipse(64, 114, 54, 10, (206, 70, 84))
    p.ellipse(64, 114, 44, 7.5, (240, 150, 120))


def _night(p: Painter, r: Random) -> None:
    for _ in range(26):
        size = r.choice((0.9, 1.2, 1.8))
        p.ellipse(r.uniform(0, 128), r.uniform(0, 76), size, size, (255, 248, 200))
    x = r.choice((r.uniform(16, 30), r.uniform(98, 112)))
    y = r.uniform(16, 26)
    p.ellipse(x, y, 12, 12, (255, 240, 170))
    p.ellipse(x + 5.5, y - 3, 10.5, 10.5, (28, 32, 84))
    p.smooth([(-10, 88), (24, 78), (64, 88), (104, 76), (138, 86), (138, 140), (-10, 140)], (34, 56, 92))
    for x in (r.uniform(6, 16), r.uniform(112, 122)):
        p.polygon([(x - 9, 98), (x - 9, 80), (x + 9, 80), (x + 9, 98)], (60, 54, 96))
        p.polygon([(x - 12, 81), (x, 70), (x + 12, 81)], (96, 48, 84))
        p.polygon([(x - 4, 93), (x - 4, 85), (x + 4, 85), (x + 4, 93)], (255, 214, 90))
    p.smooth([(-10, 100), (40, 95), (90, 99), (138, 95), (138, 140), (-10, 140)], (26, 66, 76))


def _desert(p: Painter, r: Random) -> None:
    p.ellipse(r.uniform(24, 104), r.uniform(18, 30), 14, 14, (255, 120, 70))
    x = r.uniform(-6, 30)
    p.smooth([(-20, 88), (x, 66), (64, 86), (x + 84, 62), (148, 86), (148, 140), (-20, 140)], (236, 168, 96))
    p.smooth([(-10, 98), (34, 91), (70, 97), (104, 90), (138, 96), (138, 140), (-10, 140)], (216, 138, 76))
    for x in (r.uniform(6, 16), r.uniform(111, 122)):
        h = r.uniform(56, 66)
        p.line([(x, 106), (x, h)], 8.5, (54, 130, 74))
        p.line([(x, h + 26), (x - 9, h + 24), (x - 9, h + 13)], 5.5, (54, 130, 74))
        p.line([(x, h + 20), (x + 9, h + 18), (x + 9, h + 8)], 5.5, (54, 130, 74))


def _meadow(p: Painter, r: Random) -> None:
    for _ in range(2):
        x, y = r.uniform(8, 120), r.uniform(8, 24)
        for dx, size in ((-9, 6), (0, 8.5), (9, 6)):
            p.ellipse(x + dx, y, size * 1.2, size * 0.8, (255, 255, 255))
    p.smooth([(-10, 78), (24, 64), (64, 78), (104, 62), (138, 76), (138, 140), (-10, 140)], (150, 208, 108))
    p.smooth([(-10, 96), (40, 88), (90, 95), (138, 88), (138, 140), (-10, 140)], (120, 192, 84))
    for _ in range(15):
        x = r.choice((r.uniform(0, 40), r.uniform(88, 128), r.uniform(0, 128)))
        y = r.uniform(84, 126)
        colour = r.choice(((250, 110, 150), (255, 246, 120), (255, 255, 255), (190, 120, 230)))
        for dx, dy in ((-2.4, 0), (2.4, 0), (0, -2.4), (0, 2.4)):
            p.ellipse(x + dx, y + dy, 2.2, 2.2, colour)
        p.ellipse(x, y, 1.5, 1.5, (250, 180, 40))


def _sea(p: Painter, r: Random) -> None:
    for k in range(4):
        top = k * 26
        p.polygon([(0, top), (SIZE, top), (SIZE, SIZE), (0, SIZE)], shade((64, 176, 206), 1 - 0.14 * k))
    for x in (r.uniform(20, 50), r.uniform(70, 100)):
        p.polygon([(x - 4, 0), (x + 6, 0), (x - 8, 90), (x - 26, 90)], (92, 190, 214))
    p.smooth([(-10, 104), (34, 98), (80, 104), (138, 98), (138, 140), (-10, 140)], (222, 200, 150))
    for x in (r.uniform(4, 10), r.uniform(16, 24), r.uniform(106, 112), r.uniform(118, 125)):
        top = r.uniform(50, 74)
        bends = [(x + 4 * math.sin(k * 1.3 + x), 112 - (112 - top) * k / 5) for k in range(6)]
        p.line(bends, 4.6, (30, 140, 96))
    for _ in range(12):
        size = r.uniform(1.4, 3.6)
        x, y = r.uniform(0, 128), r.uniform(2, 96)
        p.ellipse(x, y, size, size, (198, 238, 248))
        p.ellipse(x, y, size * 0.6, size * 0.6, (110, 200, 224))
    for _ in range(2):
        x, y, colour = r.choice((r.uniform(8, 26), r.uniform(102, 120))), r.uniform(14, 46), (255, 160, 60)
        p.ellipse(x, y, 6.5, 4.2, colour)
        p.polygon([(x + 5, y), (x + 11, y - 4), (x + 11, y + 4)], colour)
        p.ellipse(x - 3.2, y - 1, 1, 1, (30, 30, 40))


_DRAW = {
    "forest": _forest,
    "beach": _beach,
    "mountain": _mountain,
    "room": _room,
    "night": _night,
    "desert": _desert,
    "meadow": _meadow,
    "sea": _sea,
}
