import pytest

from storyadapter.cli.options import option
from storyadapter.method.errors import spelled
from storyadapter.method.story import Story
from storyadapter.method.story_notices import story_notices


def notices(*prompts: str, **fields) -> list[str]:
    return [spelled(notice, option) for notice in story_notices(Story(prompts, **fields))]


def test_a_definition_that_no_prompt_uses() -> None:
    told = "names are found in the same case alone"
    characters = {"Renard": "a fox", "Ann Lee": "a woman", "Quux": "a robot"}
    assert notices("reynard walks", "RENARD runs with ann  lee", characters=characters) == [
        f"no prompt names the character 'Renard'; did you mean 'RENARD'? {told}",
        f"no prompt names the character 'Ann Lee'; did you mean 'ann lee'? {told}",
        f"no prompt names the character 'Quux'; {told}",
    ]
    assert notices("Renard walks", "Ann Lee runs", "Quux", characters=characters) == []
    many = notices("nobody " * 5000, characters={f"somebody {n}": "x" for n in range(1000)})
    assert len(many) == 11 and many[-1] == "nor do they name 990 other characters"


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (
            "a (red:1.3) fox",
            "'(red:1.3)' in prompt 1 is drawn as words; weights aren't read: write the words alone, the ",
        ),
        ("a fox BREAK an owl", "'BREAK' in prompt 1 is drawn as words; prompts aren't split: take it out"),
        (
            "a fox <lora:ink:0.8>",
            "'<lora:ink:0.8>' in prompt 1 is drawn as words; take it out, and give the file to the whole run with "
            "--lora FILE:SCALE",
        ),
        (
            "a [fox:owl:0.5]",
            "'[fox:owl:0.5]' in prompt 1 is drawn as words; a prompt is the same in all steps: write one",
        ),
        ("a {red|blue} fox", "'{red|blue}' in prompt 1 is drawn as words; nothing is chosen: write one of them"),
        (
            "embedding:ink fox",
            "'embedding:ink' in prompt 1 is drawn as words; textual inversions can't be loaded: descri",
        ),
        ("a fox --ar 16:9", "'--ar 16:9' in prompt 1 is drawn as words; options in prompts aren't read: take it out"),
    ],
)
def test_syntax_of_other_programs_is_told_once(prompt: str, told: str) -> None:
    (notice,) = notices(prompt, prompt)
    assert notice.startswith(told)


def test_plain_words_are_told_nothing_of() -> None:
    assert notices("a fox (red, small) at 12:30", "daybreak, [so], a|b", "a fox - well--known", title="(x:1.3)") == []


def test_syntax_in_definitions_and_negative_prompts() -> None:
    story = Story(({"prompt": "Ann", "negative": "(snow:1.2)"},), characters={"Ann": "a {tall|small} girl"})
    told = [spelled(notice, option).partition(" is drawn")[0] for notice in story_notices(story)]
    assert told == ["'(snow:1.2)' in the negative prompt of prompt 1", "'{tall|small}' in the definition of 'Ann'"]
