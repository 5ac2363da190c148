"""The world: characters, what they do and where; seeded pictures of it, and captions in the published template."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

from PIL import Image

from storyadapter.demo.training.characters import draw_character
from storyadapter.demo.training.painter import Painter
from storyadapter.demo.training.places import GROUND, draw_place, sky
from storyadapter.demo.vocabulary import (
    ACTION_PHRASES,
    CHARACTER_PHRASES,
    IDENTITY_TRAITS,
    PLACE_PHRASES,
    TRAITS,
    Identity,
    Visible,
    character_phrase,
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
    """Every trait of a scene as the index of its value in `TRAITS`."""
    visible, identity = scene.character.visible, scene.character.identity
    named = {f.name: getattr(visible, f.name) for f in fields(visible)}
    named |= {f.name: getattr(identity, f.name) for f in fields(identity)}
    named |= {"action": scene.action, "place": scene.place}
    return {name: values.index(named[name]) for name, values in TRAITS.items()}
