"""The world: characters, what they do and where; seeded pictures of it, and captions in the published template.

A caption is Character + Interaction + Scene. It names a character's species, body colour and garment colour, and
never one of the traits of `Identity`: those are what text alone cannot keep constant over a story's frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

from PIL import Image

from storyadapter.demo.training.characters import (
    ACTIONS,
    BODY_COLOURS,
    BUILDS,
    EARS,
    EYE_COLOURS,
    GARMENT_COLOURS,
    HATS,
    KNITS,
    MARKING_COLOURS,
    MARKINGS,
    SPECIES,
    Identity,
    Visible,
    draw_character,
)
from storyadapter.demo.training.painter import Painter
from storyadapter.demo.training.places import GROUND, PLACES, draw_place, sky

VISIBLE_TRAITS: Mapping[str, tuple[str, ...]] = {
    "species": SPECIES,
    "body": tuple(BODY_COLOURS),
    "garment": tuple(GARMENT_COLOURS),
    "action": ACTIONS,
    "place": PLACES,
}
IDENTITY_TRAITS: Mapping[str, tuple[str, ...]] = {
    "marking": MARKINGS,
    "marking_colour": tuple(MARKING_COLOURS),
    "ears": EARS,
    "hat": HATS,
    "eyes": tuple(EYE_COLOURS),
    "build": BUILDS,
    "knit": KNITS,
}
ACTION_PHRASES: Mapping[str, tuple[str, ...]] = {
    "standing": ("standing", "standing still"),
    "running": ("running", "running fast"),
    "jumping": ("jumping", "jumping high"),
    "sleeping": ("sleeping", "sleeping on the ground"),
    "reading": ("reading a book", "sitting and reading a book"),
    "flag": ("waving a flag", "holding a flag"),
    "balloon": ("holding a balloon", "holding a big balloon"),
}
PLACE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "forest": ("in the forest", "in a green forest"),
    "beach": ("on the beach", "on a sunny beach"),
    "mountain": ("on a snowy mountain", "in the snowy mountains"),
    "room": ("in a cosy room", "at home in a room"),
    "night": ("at night", "on a starry night"),
    "desert": ("in the desert", "in a hot desert"),
    "meadow": ("in a meadow", "in a meadow full of flowers"),
    "sea": ("under the sea", "deep under the sea"),
}
CHARACTER_PHRASES = (
    "{a} {body} {species} wearing {g} {garment} sweater",
    "{a} {body} {species} in {g} {garment} sweater",
    "{a} {body} {species}, wearing {g} {garment} sweater,",
)

_ZOOM = {"round": 1.1, "tall": 1.0, "big head": 1.04}  # fills the frame with every build


@dataclass(frozen=True)
class Character:
    """Somebody of the world."""

    visible: Visible
    identity: Identity


@dataclass(frozen=True)
class Scene:
    """One picture: who does what and where, and the seed of everything else (position, details of the place)."""

    character: Character
    action: str
    place: str
    seed: int


def all_visible() -> list[Visible]:
    """Every character that captions can tell apart, in a fixed order."""
    return [Visible(s, b, g) for s in SPECIES for b in BODY_COLOURS for g in GARMENT_COLOURS]


def random_identity(random: Random) -> Identity:
    """Draw each trait that no caption names, evenly and independently."""
    return Identity(**{name: random.choice(values) for name, values in IDENTITY_TRAITS.items()})


def draw(scene: Scene) -> Image.Image:
    """Draw a scene: RGB, 128×128. The same scene always gives the same picture."""
    random = Random(scene.seed)
    painter = Painter(sky(scene.place))
    draw_place(painter, scene.place, random)
    x, y, scale = random.uniform(56, 72), GROUND + random.uniform(-2, 5), random.uniform(0.95, 1.04)
    scale *= _ZOOM[scene.character.identity.build]
    mirror = random.random() < 0.5
    painter.ellipse(x, y + 2, 25, 4, (60, 60, 62))
    with painter.frame(x, y, scale=scale, mirror=mirror):
        draw_character(painter, scene.character.visible, scene.character.identity, scene.action)
    return painter.picture()


def character_phrase(visible: Visible, form: int = 0) -> str:
    """What a caption calls the character, for example `a blue fox wearing a red sweater`."""
    article = "an" if visible.body[0] in "aeiou" else "a"
    return CHARACTER_PHRASES[form].format(
        a=article, body=visible.body, species=visible.species, g="a", garment=visible.garment
    )


def caption(scene: Scene, random: Random | None = None) -> str:
    """The scene in words: Character + Interaction + Scene.

    Args:
        scene: what to describe.
        random: chooses among wordings, and now and then leaves a colour out; without it, the plain wording.
    """
    visible = scene.character.visible
    if random is None:
        return f"{character_phrase(visible)} is {ACTION_PHRASES[scene.action][0]} {PLACE_PHRASES[scene.place][0]}"
    who = character_phrase(visible, random.randrange(len(CHARACTER_PHRASES)))
    if random.random() < 0.06:
        who = f"a {visible.species}"
    link = random.choice((" is ", " is ", " "))
    words = f"{who}{link}{random.choice(ACTION_PHRASES[scene.action])} {random.choice(PLACE_PHRASES[scene.place])}"
    return words + random.choice(("", "."))


def labels(scene: Scene) -> dict[str, int]:
    """Every trait of a scene as the index of its value in `VISIBLE_TRAITS` or `IDENTITY_TRAITS`."""
    visible, identity = scene.character.visible, scene.character.identity
    named = {f.name: getattr(visible, f.name) for f in fields(visible)}
    named |= {f.name: getattr(identity, f.name) for f in fields(identity)}
    named |= {"action": scene.action, "place": scene.place}
    return {name: values.index(named[name]) for name, values in {**VISIBLE_TRAITS, **IDENTITY_TRAITS}.items()}
