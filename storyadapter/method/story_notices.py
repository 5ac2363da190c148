"""What of a story won't be drawn as its author may think: definitions that no prompt uses, other programs' syntax."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Final

from storyadapter.method.errors import Field, Text
from storyadapter.method.story import Story
from storyadapter.method.story_files.document import excerpt
from storyadapter.method.text import normalized

_NAMES_TOLD: Final = 10
_PHRASES_COMPARED: Final = 2_000
_PROMPT_LETTERS: Final = 2_000
_LETTERS: Final = 100  # of a word that is compared
# what other programs read as more than words -> what to do
_SYNTAX: Final[tuple[tuple[re.Pattern[str], Text], ...]] = (
    (
        re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>"),
        ("take it out, and give the file to the whole run with ", Field("lora"), " FILE:SCALE"),
    ),
    (
        re.compile(r"\([^()]{1,200}:[ \t]*[-+]?\d*\.?\d+[ \t]*\)"),
        "weights aren't read: write the words alone, the important ones first",
    ),
    (re.compile(r"(?<!\w)BREAK(?!\w)"), "prompts aren't split: take it out"),
    (re.compile(r"\[[^][]{1,200}:[ \t]*\d*\.?\d+[ \t]*\]"), "a prompt is the same in all steps: write one of them"),
    (
        re.compile(r"\{[^{}]{0,200}\|[^{}]{0,200}\}|(?<!\w)__[\w/-]{1,60}__(?!\w)"),
        "nothing is chosen: write one of them",
    ),
    (re.compile(r"(?<!\w)embedding:[\w.-]+"), "textual inversions can't be loaded: describe what it stands for"),
    (
        re.compile(
            r"(?<!\S)--(?:ar|aspect|chaos|cref|iw|niji|no|q|s|seed|sref|style|stylize|v|w|h)(?:[ \t]+\S+)?(?!\S)"
        ),
        "options in prompts aren't read: take it out",
    ),
)


def story_notices(story: Story) -> tuple[Text, ...]:
    """One text for each thing that its author should know before the story is drawn."""
    return (*_unused(story), *_foreign_syntax(story))


def _unused(story: Story) -> Iterator[Text]:
    used = {name for found in story.characters_found() for name in found}
    unused = [name for name in story.characters if name not in used]
    for name in unused[:_NAMES_TOLD]:
        close = _closest(story, normalized(name))
        hint = f"; did you mean {excerpt(close)}? " if close else "; "
        yield f"no prompt names the character {excerpt(name)}{hint}names are found in the same case alone"
    if len(unused) > _NAMES_TOLD:
        yield f"nor do they name {len(unused) - _NAMES_TOLD} other characters"


def _closest(story: Story, name: str) -> str | None:
    """What is most like a name among as many words of the prompts as it has."""
    phrases = dict(islice(_phrases(story, len(name.split())), _PHRASES_COMPARED))
    close = get_close_matches(name.casefold()[:_LETTERS], phrases, n=1, cutoff=0.7)
    return phrases[close[0]] if close else None


def _phrases(story: Story, count: int) -> Iterator[tuple[str, str]]:
    """So many words that follow each other in a prompt, in small letters and as they are."""
    for prompt in story.prompts:
        words = [word.strip(".,;:!?\"'()")[:_LETTERS] for word in normalized(prompt[:_PROMPT_LETTERS]).split()]
        for start in range(len(words) - count + 1):
            phrase = " ".join(words[start : start + count])
            yield phrase.casefold(), phrase


def _foreign_syntax(story: Story) -> Iterator[Text]:
    texts = [(f"prompt {number}", frame.prompt) for number, frame in enumerate(story.frames, 1)]
    texts += [(f"the negative prompt of prompt {n}", f.negative) for n, f in enumerate(story.frames, 1) if f.negative]
    definitions = ((name, who.definition) for name, who in story.characters.items())
    texts += [(f"the definition of {excerpt(name)}", text) for name, text in definitions if text]
    for pattern, advice in _SYNTAX:
        if first := next(((where, match) for where, text in texts if (match := pattern.search(text))), None):
            where, match = first
            yield (f"{excerpt(match[0])} in {where} is drawn as words; ", advice)
