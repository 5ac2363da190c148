"""The words of the demo model's world: what captions name of a picture, and what they never name.

A caption is Character + Interaction + Scene. It names a character's species, body colour and garment colour, and
never one of the traits of `Identity`: those are what text alone cannot keep constant over a story's frames.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, product

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
FRAMES_AT_MOST = len(VISIBLE_TRAITS["action"]) * len(VISIBLE_TRAITS["place"])  # of a held-out story: scenes
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


# What people call the traits, for a word that isn't known.
KINDS: Mapping[str, str] = {
    "species": "animals",
    "body": "colours of animals",
    "garment": "colours of sweaters",
    "action": "actions",
    "place": "places",
}


def known_words() -> frozenset[str]:
    """Every word that captions have: all that the model was taught, style words aside."""
    phrases = chain(*VISIBLE_TRAITS.values(), *ACTION_PHRASES.values(), *PLACE_PHRASES.values(), CHARACTER_PHRASES)
    return frozenset(re.findall("[a-z]+", re.sub(r"{\w+}", "", " ".join((*phrases, "a an is")))))


def unknown_words(prompts: Iterable[str]) -> dict[str, list[str]]:
    """The words of prompts that the model was never taught, by the trait that each seems to stand for, in order.

    A caption has a place for each: "a *blue* *fox* wearing a *red* sweater *running* in the *forest*".
    """
    known = known_words()
    found: dict[str, dict[str, None]] = {}
    for prompt in prompts:
        words = re.findall(r"[^\W\d_]+", prompt.lower())
        for index, word in enumerate(words):
            if word not in known:
                kind = _kind(word, words[:index], words[index + 1 :])
                found.setdefault(kind, {})[word] = None
    return {kind: list(found[kind]) for kind in KINDS if kind in found}


def examples(kind: str) -> tuple[str, ...]:
    """What the model knows of a kind, as captions say it."""
    phrases = {"action": ACTION_PHRASES, "place": PLACE_PHRASES}.get(kind)
    return tuple(words[0] for words in phrases.values()) if phrases else VISIBLE_TRAITS[kind]


def _kind(word: str, before: list[str], after: list[str]) -> str:
    if "sweater" in after[:2]:
        return "garment"
    if after[:1] and after[0] in VISIBLE_TRAITS["species"]:
        return "body"
    if word.endswith("ing"):
        return "action"
    named = any(earlier in VISIBLE_TRAITS["species"] for earlier in before)
    return "place" if named or {"in", "on", "at", "under"} & set(before[-3:]) else "species"
