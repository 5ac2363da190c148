"""Draws a character: what captions name (species, colours, action) and what they never name (identity)."""

from __future__ import annotations

from dataclasses import dataclass

from storyadapter.demo.training.painter import Colour, Painter, Point, shade
from storyadapter.demo.vocabulary import Identity, Visible

BODY_COLOURS: dict[str, Colour] = {
    "orange": (238, 130, 48),
    "brown": (146, 94, 58),
    "grey": (150, 156, 168),
    "blue": (92, 156, 226),
    "pink": (244, 150, 182),
    "green": (112, 184, 92),
}
GARMENT_COLOURS: dict[str, Colour] = {
    "red": (214, 44, 46),
    "yellow": (250, 208, 50),
    "navy": (38, 56, 140),
    "teal": (20, 140, 132),
    "white": (246, 244, 238),
    "purple": (136, 62, 168),
}
MARKING_COLOURS: dict[str, Colour] = {
    "white": (252, 250, 244),
    "black": (40, 36, 44),
    "yellow": (255, 226, 60),
    "magenta": (196, 30, 120),
}
EYE_COLOURS: dict[str, Colour] = {
    "green": (40, 160, 60),
    "blue": (36, 110, 235),
    "amber": (245, 150, 10),
    "red": (222, 36, 60),
}
BLACK: Colour = (34, 30, 36)
WHITE: Colour = (252, 250, 246)
CREAM: Colour = (255, 240, 214)
LINE = 1.3  # width of the ink around shapes


@dataclass(frozen=True)
class _Shape:
    """Sizes of one build, in pixels: radii of head and body, length of the legs."""

    head_x: float
    head_y: float
    body_x: float
    body_y: float
    legs: float


_SHAPES = {
    "round": _Shape(24, 20, 25, 19, 7),
    "tall": _Shape(22.5, 20, 13.5, 20, 15),
    "big head": _Shape(30, 25, 15.5, 14, 8),
}


def draw_character(painter: Painter, visible: Visible, identity: Identity, action: str) -> None:
    """Draw a character that stands on the present frame's origin, about 95 pixels high."""
    _Figure(painter, visible, identity).draw(action)


class _Figure:
    def __init__(self, painter: Painter, visible: Visible, identity: Identity) -> None:
        self.p = painter
        self.visible = visible
        self.identity = identity
        self.fur = BODY_COLOURS[visible.body]
        self.wool = GARMENT_COLOURS[visible.garment]
        self.mark = MARKING_COLOURS[identity.marking_colour]
        self.shape = _SHAPES[identity.build]

    # --- poses -----------------------------------------------------------------------------------------------------

    def draw(self, action: str) -> None:
        {
            "standing": self._stand,
            "running": self._run,
            "jumping": self._jump,
            "sleeping": self._sleep,
            "reading": self._read,
            "flag": self._wave_flag,
            "balloon": self._hold_balloon,
        }[action]()

    def _stand(self) -> None:
        s = self.shape
        hips, waist, shoulders, head = self._heights(s.legs)
        self._tail(-s.body_x * 0.8, waist + 3)
        for side in (-1, 1):
            self._limb([(side * s.body_x * 0.45, hips), (side * s.body_x * 0.5, -2.5)], foot=True)
        self._torso(0, waist)
        for side in (-1, 1):
            self._arm([(side * s.body_x * 0.72, shoulders), (side * (s.body_x + 4), waist + 5)])
        self._head(0, head)

    def _run(self) -> None:
        s = self.shape
        hips, waist, shoulders, head = self._heights(s.legs)
        for x, y, r in ((-38, -5, 5), (-46, -9, 3.5), (-33, -12, 3)):
            self.p.ellipse(x, y, r, r * 0.8, (232, 226, 216), outline=0.6)
        with self.p.frame(-3, -1, angle=13):
            self._tail(-s.body_x * 0.8, waist + 2)
            self._limb([(-4, hips), (-15, hips + 5), (-25, hips + 1)], foot=True)
            self._arm([(-s.body_x * 0.5, shoulders), (-s.body_x - 7, shoulders + 8), (-s.body_x - 13, shoulders + 1)])
            self._torso(0, waist)
            self._limb([(4, hips + 1), (17, hips + 1), (19, hips + 9)], foot=True)
            self._arm([(s.body_x * 0.5, shoulders), (s.body_x + 5, shoulders + 7), (s.body_x + 12, shoulders - 4)])
        with self.p.frame(6, 0, angle=5):
            self._head(0, head)

    def _jump(self) -> None:
        s = self.shape
        with self.p.frame(0, -13, scale=0.9):
            hips, waist, shoulders, head = self._heights(s.legs)
            self._tail(-s.body_x * 0.8, waist + 2)
            for side in (-1, 1):
                self._limb([(side * 6, hips), (side * 17, hips + 3), (side * 14, hips + 12)], foot=True)
            self._torso(0, waist)
            for side in (-1, 1):
                self._arm([(side * s.body_x * 0.7, shoulders), (side * (s.body_x + 16), shoulders - 14)])
            self._head(0, head)

    def _sleep(self) -> None:
        s = self.shape
        body = 12.0 if self.identity.build == "tall" else 15.0
        length = s.body_x * 1.1 if self.identity.build == "round" else s.body_y * 1.15
        with self.p.frame(15 + (6 if self.identity.build == "tall" else 0), 0):
            self._tail(length, -12, curled=True)
            for y in (-5, -12):
                self._limb([(length * 0.6, y), (length + s.legs * 0.6, y + 1)], foot=True)
            with self.p.frame(0, -body, angle=-90):
                self._torso(0, 0, body, length)
            self._arm([(-length * 0.5, -9), (-length * 0.1, -4.5)])
        with self.p.frame(-16, -s.head_y + 1, angle=-12):
            self._head(0, 0, asleep=True)
        for x, y, size in ((17, -48, 5), (26, -60, 7), (37, -74, 9)):
            self.p.line([(x, y), (x + size, y), (x, y + size), (x + size, y + size)], 2.6, WHITE, outline=1.1)

    def _read(self) -> None:
        s = self.shape
        lift = 6.0
        hips, waist, shoulders, head = self._heights(lift)
        self._tail(-s.body_x * 0.8, waist + 5)
        self._torso(0, waist)
        for side in (-1, 1):
            self._limb([(side * s.body_x * 0.5, -lift), (side * (s.body_x * 0.6 + s.legs), -4)], foot=True)
        self._head(0, head)
        top, low = waist + 4, waist + 19
        for side in (-1, 1):
            self.p.polygon([(0, top + 2), (side * 20, top - 2), (side * 20, low - 4), (0, low)], (205, 80, 40), LINE)
            self.p.polygon([(0, top + 3), (side * 18, top - 2), (side * 18, low - 6), (0, low - 2)], WHITE)
            for k in range(3):
                y = top + 4 + 3.4 * k
                self.p.line([(side * 4, y), (side * 15, y - 3)], 1.0, (150, 150, 160))
            self._arm([(side * s.body_x * 0.85, shoulders + 3), (side * 21, waist + 8)])

    def _wave_flag(self) -> None:
        s = self.shape
        hips, waist, shoulders, head = self._heights(s.legs)
        self._tail(-s.body_x * 0.8, waist + 3)
        for side in (-1, 1):
            self._limb([(side * s.body_x * 0.45, hips), (side * s.body_x * 0.6, -2.5)], foot=True)
        self._torso(0, waist)
        self._arm([(-s.body_x * 0.72, shoulders), (-s.body_x - 4, waist + 5)])
        hand = (s.head_x + 8, shoulders - 5)
        self._head(-2, head)
        x = hand[0] + 1
        self.p.line([(x, hand[1] + 14), (x, -96)], 2.6, (150, 104, 60), outline=0.8)
        cloth = [(x, -97), (x + 9, -100), (x + 18, -95), (x + 27, -97), (x + 26, -80), (x + 17, -77), (x + 9, -81)]
        self.p.smooth([*cloth, (x, -78)], (228, 40, 50), LINE)
        self.p.ellipse(x + 13, -88.5, 4.6, 4.6, WHITE)
        self._arm([(s.body_x * 0.72, shoulders), hand])

    def _hold_balloon(self) -> None:
        s = self.shape
        hips, waist, shoulders, head = self._heights(s.legs)
        hand = (s.body_x + 13, waist - 2)
        x, y = hand[0] + 8, -86.0
        self.p.line([hand, (hand[0] + 5, -60), (x, y + 16)], 1.2, (90, 80, 90))
        self._tail(-s.body_x * 0.8, waist + 3)
        for side in (-1, 1):
            self._limb([(side * s.body_x * 0.45, hips), (side * s.body_x * 0.5, -2.5)], foot=True)
        self._torso(0, waist)
        self._arm([(-s.body_x * 0.72, shoulders), (-s.body_x - 4, waist + 5)])
        self._arm([(s.body_x * 0.72, shoulders), hand])
        self._head(-3, head)
        self.p.polygon([(x - 3, y + 19), (x + 3, y + 19), (x, y + 13)], (250, 170, 30), 0.8)
        self.p.ellipse(x, y, 13.5, 16, (255, 186, 40), LINE)
        self.p.ellipse(x - 4.5, y - 6, 3, 4.5, (255, 236, 180), angle=20)

    def _heights(self, legs: float) -> tuple[float, float, float, float]:
        """Where hips, waist, shoulders and head's centre are."""
        s = self.shape
        waist = -legs - s.body_y + 3
        return -legs - 2, waist, waist - s.body_y * 0.5, waist - s.body_y - s.head_y + 6

    # --- parts of the body -----------------------------------------------------------------------------------------

    def _limb(self, points: list[Point], foot: bool = False) -> None:
        self.p.line(points, 8, self.fur, LINE)
        x, y = points[-1]
        self.p.ellipse(x + (1.5 if foot else 0), y, 6 if foot else 5, 4.2 if foot else 4.8, self.mark, LINE)

    def _arm(self, points: list[Point]) -> None:
        self.p.line(points, 7.5, shade(self.wool, 0.93), LINE)
        self.p.ellipse(*points[-1], 4.9, 4.9, self.mark, LINE)

    def _torso(self, x: float, y: float, rx: float | None = None, ry: float | None = None) -> None:
        rx, ry = rx or self.shape.body_x, ry or self.shape.body_y
        trim = (54, 58, 74) if self.visible.garment in ("white", "yellow") else WHITE
        self.p.ellipse(x, y, rx, ry, self.wool, LINE)
        if self.identity.knit == "striped":
            for height in (-0.34, 0.08, 0.5):
                half = rx * (1 - height**2) ** 0.5 - 1
                self.p.line([(x - half + 2, y + ry * height), (x + half - 2, y + ry * height)], 3.6, trim)
        elif self.identity.knit == "starred":
            outer, inner = 9.5, 4.2
            spikes = ((0, -1), (0.59, -0.81), (0.95, -0.31), (0.95, 0.31), (0.59, 0.81))
            turned = [*spikes, (0, 1), *((-u, v) for u, v in reversed(spikes[1:]))]
            star = [
                (x + u * (outer if k % 2 == 0 else inner), y + 0.5 + v * (outer if k % 2 == 0 else inner))
                for k, (u, v) in enumerate(turned)
            ]
            self.p.polygon(star, trim)

    def _tail(self, x: float, y: float, curled: bool = False) -> None:
        flip = 1 if curled else -1
        with self.p.frame(x, y, mirror=flip < 0, angle=20 if curled else 0):
            match self.visible.species:
                case "fox":
                    self.p.smooth([(-3, 3), (8, 7), (19, 1), (24, -13), (14, -10), (7, -4)], self.fur, LINE)
                    self.p.smooth([(19, -2), (24, -13), (15, -10.5), (14, -5)], WHITE)
                case "rabbit":
                    self.p.ellipse(5, 2, 6.5, 6.5, WHITE, LINE)
                case "cat":
                    self.p.line([(-2, 3), (9, 6), (17, 0), (18, -10), (23, -15)], 5, self.fur, LINE)
                case "elephant":
                    self.p.line([(-2, 2), (10, 4), (14, 9)], 2.4, self.fur, 1)
                case "owl":
                    self.p.polygon([(-2, -3), (14, 8), (2, 10)], shade(self.fur, 0.8), LINE)
                case "bear":
                    self.p.ellipse(3, 3, 4.5, 4.5, self.fur, LINE)

    # --- the head --------------------------------------------------------------------------------------------------

    def _head(self, x: float, y: float, asleep: bool = False) -> None:
        s = self.shape
        unit = s.head_x / 24  # features grow with the head
        with self.p.frame(x, y):
            self._ears(unit)
            if self.visible.species == "fox":
                rx, ry = s.head_x, s.head_y
                cheeks = [
                    (0, -ry),
                    (rx * 0.78, -ry * 0.72),
                    (rx * 0.98, 0),
                    (rx * 1.2, ry * 0.52),
                    (rx * 0.5, ry * 0.86),
                ]
                self.p.smooth([*cheeks, (0, ry * 1.05), *((-u, v) for u, v in reversed(cheeks[1:]))], self.fur, LINE)
            else:
                self.p.ellipse(0, 0, s.head_x, s.head_y, self.fur, LINE)
            with self.p.frame(0, 0, scale=unit):
                self._muzzle()
                self._markings()
                self._eyes(asleep)
                self._nose()
            with self.p.frame(0, -s.head_y + 2.5 * unit, scale=(1 + unit) / 2):
                self._hat()

    def _ears(self, unit: float) -> None:
        s, trait = self.shape, self.identity.ears
        for side in (-1, 1):
            droops = trait == "drooping" or (trait == "lopsided" and side > 0)
            x, y = (0.86, -0.42) if droops else (0.6, -0.74)
            with (
                self.p.frame(0, 0, mirror=side < 0),
                self.p.frame(x * s.head_x, y * s.head_y, angle=118 if droops else 20, scale=unit),
            ):
                self._ear(droops)

    def _ear(self, droops: bool) -> None:
        """One ear that points up from the origin."""
        inner = shade(self.fur, 0.62) if self.visible.body == "pink" else (250, 190, 190)
        match self.visible.species:
            case "fox":
                self.p.polygon([(-12, 5), (0, -24), (12, 5)], self.fur, LINE)
                self.p.polygon([(-7, 2), (0, -16), (7, 2)], BLACK)
            case "rabbit":
                self.p.ellipse(0, -15, 6.8, 20, self.fur, LINE)
                self.p.ellipse(0, -15, 3.2, 14, inner)
            case "cat":
                self.p.polygon([(-12, 6), (-4, -22), (13, 5)], self.fur, LINE)
                self.p.polygon([(-7, 3), (-3, -14), (7.5, 3)], inner)
            case "bear":
                self.p.ellipse(0, -7 if droops else -5, 10, 11, self.fur, LINE)
                self.p.ellipse(0, -7 if droops else -5, 6, 7, shade(self.fur, 0.65))
            case "owl":
                self.p.polygon([(-8, 6), (4, -23), (10, 6)], shade(self.fur, 0.6), LINE)
            case "elephant":
                self.p.ellipse(2, -10, 13, 17, self.fur, LINE)
                self.p.ellipse(2, -10, 8.5, 12, shade(self.fur, 1.4))

    def _muzzle(self) -> None:
        match self.visible.species:
            case "fox":
                self.p.smooth([(0, 4), (12, 6), (23, 9), (9, 17), (0, 20), (-9, 17), (-23, 9), (-12, 6)], WHITE)
            case "bear":
                self.p.ellipse(0, 10, 11.5, 8.5, CREAM)
            case "rabbit":
                self.p.ellipse(-5, 11, 6, 5, shade(self.fur, 1.6))
                self.p.ellipse(5, 11, 6, 5, shade(self.fur, 1.6))
            case "cat":
                self.p.ellipse(-4, 10, 5, 4, CREAM)
                self.p.ellipse(4, 10, 5, 4, CREAM)
            case "owl":
                for side in (-1, 1):
                    self.p.ellipse(side * 9.8, -1, 12.5, 12.5, CREAM, 0.8)

    def _markings(self) -> None:
        match self.identity.marking:
            case "spots":
                for side in (-1, 1):
                    self.p.ellipse(side * 14.5, 13, 6.4, 6.4, self.mark, LINE)
            case "stripes":
                for side in (-1, 1):
                    for y in (-8, -1, 6):
                        self.p.line([(side * 15, y), (side * 26.5, y - 1.5)], 4.6, self.mark, 0.8)
                for x in (-8, 0, 8):
                    self.p.polygon([(x - 2.6, -19), (x + 2.6, -19), (x, -6)], self.mark, 0.8)
            case "patch":
                self.p.ellipse(10.5, -1, 13, 14.5, self.mark, 0.8)
            case "blaze":
                self.p.polygon([(-8, -18.5), (8, -18.5), (3.4, 0), (6, 5), (-6, 5), (-3.4, 0)], self.mark, 0.8)
                self.p.ellipse(0, 15, 8, 5, self.mark, 0.8)

    def _eyes(self, asleep: bool) -> None:
        iris = EYE_COLOURS[self.identity.eyes]
        for side in (-1, 1):
            x = side * 9.6
            if asleep:
                self.p.ellipse(x, -0.5, 6.8, 5.2, iris, 0.8)
                self.p.line([(x - 6.2, 1.5), (x, 4.2), (x + 6.2, 1.5)], 1.9, BLACK)
            else:
                self.p.ellipse(x, -1.5, 7, 7.8, WHITE, 0.9)
                self.p.ellipse(x, -0.8, 5.6, 6.2, iris)
                self.p.ellipse(x, -0.6, 2.3, 2.9, BLACK)
                self.p.ellipse(x - 1.8, -3.4, 1.6, 1.6, WHITE)

    def _nose(self) -> None:
        match self.visible.species:
            case "owl":
                self.p.polygon([(-4, 4), (4, 4), (0, 12.5)], (250, 160, 30), 0.9)
            case "elephant":
                self.p.line([(0, 6), (0.5, 14), (3, 21), (10, 22.5)], 7.4, shade(self.fur, 1.12), 1.1)
                for y in (10, 14.5):
                    self.p.line([(-2.6, y), (3, y)], 0.9, shade(self.fur, 0.7))
            case "rabbit":
                self.p.ellipse(0, 7.5, 2.8, 2, (235, 100, 130))
                self.p.polygon([(-2.6, 12), (2.6, 12), (2.4, 17), (-2.4, 17)], WHITE, 0.7)
            case "bear":
                self.p.ellipse(0, 6.5, 4.8, 3.3, BLACK)
                self.p.line([(-3.5, 13), (0, 14.5), (3.5, 13)], 1.3, BLACK)
            case "cat":
                self.p.polygon([(-2.6, 6), (2.6, 6), (0, 9)], (235, 100, 130))
                for side in (-1, 1):
                    for dy in (-1.5, 2.5):
                        self.p.line([(side * 9, 10 + dy * 0.4), (side * 25, 10 + dy * 1.9)], 0.9, BLACK)
            case "fox":
                self.p.ellipse(0, 10, 3.8, 2.8, BLACK)

    def _hat(self) -> None:
        """The hat, seated on the origin."""
        match self.identity.hat:
            case "crown":
                points = [(-13, 4), (-15, -12), (-7.5, -5), (0, -15), (7.5, -5), (15, -12), (13, 4)]
                self.p.polygon(points, (255, 206, 40), LINE)
                for x in (-8, 0, 8):
                    self.p.ellipse(x, -0.5, 2, 2, (220, 40, 60))
            case "top hat":
                self.p.polygon([(-10.5, 1), (-12, -21), (12, -21), (10.5, 1)], (44, 42, 58), 1)
                self.p.polygon([(-10.7, -2), (-11, -7.5), (11, -7.5), (10.7, -2)], (222, 44, 52))
                self.p.ellipse(0, 2, 18.5, 3.6, (44, 42, 58), 1)
            case "beanie":
                self.p.smooth(
                    [(-16, 5), (-14, -6), (-7, -13), (0, -15), (7, -13), (14, -6), (16, 5)], (30, 190, 190), LINE
                )
                self.p.line([(-15, 4), (15, 4)], 5, (230, 250, 250), 1)
                self.p.ellipse(0, -16.5, 5, 5, WHITE, 1)
            case "bow":
                for side in (-1, 1):
                    self.p.smooth(
                        [(0, -2), (side * 8, -10), (side * 16, -8), (side * 15, 4), (side * 8, 3)], (250, 70, 160), LINE
                    )
                self.p.ellipse(0, -2.5, 4.2, 4.6, (216, 40, 120), 1)
