"""Which words the demo model knows, and what is said of others."""

import pytest

from storyadapter.demo.shipped import STORY
from storyadapter.demo.vocabulary import KINDS, examples, known_words, unknown_words
from storyadapter.method.story import Story


def test_every_story_that_is_shipped_is_of_known_words() -> None:
    assert unknown_words(Story.from_file(STORY).final_prompts("none")) == {}


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a dragon", {"species": ["dragon"]}),
        ("A Lion and a DRAGON", {"species": ["lion", "dragon"]}),
        ("a magenta fox wearing a red sweater", {"body": ["magenta"]}),
        ("a blue fox wearing a magenta sweater", {"garment": ["magenta"]}),
        ("a blue fox dancing in the forest", {"action": ["dancing"]}),
        ("a blue fox running in a castle", {"place": ["castle"]}),
        ("in the old castle", {"place": ["old", "castle"]}),
        ("ein Fuchs läuft", {"species": ["ein", "fuchs", "läuft"]}),
        ("", {}),
    ],
)
def test_unknown_words_by_kind(prompt: str, unknown: dict[str, list[str]]) -> None:
    assert unknown_words([prompt, prompt]) == unknown


def test_what_it_knows_of_each_kind_is_known() -> None:
    for kind in KINDS:
        assert unknown_words(examples(kind)) == {}
    assert "fox" in examples("species") and "in the forest" in examples("place")
    assert len(known_words()) == 64
