"""The words of the demo model's world: what captions name of a picture, and what they never name.

A caption is Character + Interaction + Scene. It names a character's species, body colour and garment colour, and
never one of the traits of `Identity`: those are what text alone cannot keep constant over a story's frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

VISIBLE_TRAITS: Mapping[str, tuple[str, ...]] = {
    "species": ("fox", "rabbit", "bear", "cat", "owl", "elephant"),
    "body": ("orange", "brown", "grey", "blue", "pink", "green"),
    "garment": ("red", "yellow", "navy", "teal", "white", "purple"),
    "action": ("standing", "running", "jumping", "sleeping", "reading", "flag", "balloon"),
    "place": ("forest", "beach", "mountain", "room", "night", "desert", "meadow", "sea"),
}
IDENTITY_TRAITS: Mapping[str, tuple[str, ...]] = {
    "marking": ("spots", "stripes", "patch", "blaze"),
    "marking_colour": ("white", "black", "yellow", "magenta"),
    "ears": ("upright", "drooping", "lopsided"),
    "hat": ("none", "crown", "top hat", "beanie", "bow"),
    "eyes": ("green", "blue", "amber", "red"),
    "build": ("round", "tall", "big head"),
    "knit": ("plain", "striped", "starred"),
}
TRAITS: Mapping[str, tuple[str, ...]] = {**VISIBLE_TRAITS, **IDENTITY_TRAITS}  # what the judge reads, in this order
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


@dataclass(frozen=True)
class Visible:
    """What a caption names of a character."""

    species: str
    body: str
    garment: str


@dataclass(frozen=True)
class Identity:
    """What no caption ever names."""

    marking: str
    marking_colour: str
    ears: str
    hat: str
    eyes: str
    build: str
    knit: str


def all_visible() -> list[Visible]:
    """Every character that captions can tell apart, in a fixed order."""
    return [Visible(*kind) for kind in product(*(VISIBLE_TRAITS[name] for name in ("species", "body", "garment")))]


def character_phrase(visible: Visible, form: int = 0) -> str:
    """What a caption calls the character, for example `a blue fox wearing a red sweater`."""
    article = "an" if visible.body[0] in "aeiou" else "a"
    return CHARACTER_PHRASES[form].format(
        a=article, body=visible.body, species=visible.species, g="a", garment=visible.garment
    )
