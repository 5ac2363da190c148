import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from storyadapter.cli.options import typed
from storyadapter.method.constants import STYLES
from storyadapter.method.errors import InputError
from storyadapter.method.story import Story, check_style

# Everything a prompt may hold: no control characters, no halves of surrogate pairs.
LETTERS = st.characters(exclude_categories=("Cc", "Cs"))
LINES = st.text(LETTERS, min_size=1, max_size=40).filter(str.strip)
TEXTS = st.text(LETTERS | st.sampled_from("\n\t"), min_size=1, max_size=40).filter(str.strip)
FRAMES = st.builds(
    dict,
    prompt=TEXTS,
    negative=st.none() | st.just("") | TEXTS,
    seed=st.none() | st.integers(0, 2**63 - 1),
)
STORIES = st.builds(
    Story,
    prompts=st.lists(TEXTS | FRAMES, min_size=1, max_size=5).map(tuple),
    title=st.none() | TEXTS,
    style=st.none() | st.sampled_from(sorted(STYLES)),
    characters=st.dictionaries(LINES.map(str.strip), TEXTS, max_size=3),
)


# what makes a list, a table, JSON or fences of lines
OF_ANOTHER_FORM = re.compile(r"^[\s*_(]*(\d+|[-*+•◦▪–—])|[,;\t`~{]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stories")


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def message(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert caught.value.exit_code == 2
    text = typed(caught.value)
    assert "\n" not in text
    return text


@given(STORIES, st.booleans())
def test_yaml_reads_back(folder: Path, story: Story, readable: bool) -> None:
    text = yaml.safe_dump(story.to_dict(), allow_unicode=readable, default_flow_style=readable or None)
    assert Story.from_file(written(folder, "story.yaml", text)) == story


@given(STORIES, st.booleans())
def test_json_reads_back(folder: Path, story: Story, ascii_only: bool) -> None:
    text = json.dumps(story.to_dict(), ensure_ascii=ascii_only)
    assert Story.from_file(written(folder, "story.json", text)) == story


@given(st.lists(LINES, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n  \n"]), st.booleans())
def test_text_reads_back(folder: Path, prompts: list[str], line_end: str, mark: bool) -> None:
    data = line_end.join(prompts).encode("utf-8-sig" if mark else "utf-8")
    assume(mark or not prompts[0].startswith("\ufeff"))  # else the prompt's first letter is a byte order mark
    assume(not any(OF_ANOTHER_FORM.search(prompt) for prompt in prompts))
    assert Story.from_file(written(folder, "story.txt", data)) == Story.from_prompts(prompts)


@given(STORIES)
def test_to_dict_identifies_the_story(story: Story) -> None:
    again = Story(**{**story.to_dict(), "prompts": tuple(story.to_dict()["prompts"])})
    assert again == story
    assert hash(again) == hash(story)
    longer = Story((*story.frames, "one more"), story.title, story.style, story.characters)
    assert longer.to_dict() != story.to_dict()


YAML_STORY = """
# a comment
title: Lost at sea
style: film
characters:
  Robinson: a man, wearing tattered sailor clothes.
prompts:
  - Robinson walks in the forest.
  - >
    Close-up of Robinson's
    face.
"""


def test_story_file_to_final_prompts(folder: Path) -> None:
    story = Story.from_file(written(folder, "robinson.yml", YAML_STORY))
    assert story.title == "Lost at sea"
    assert story.final_prompts() == (
        "best quality, high quality, cinematic film still, a man, wearing tattered sailor clothes. walks in the forest."
        " . shallow depth of field, vignette, highly detailed, high budget, bokeh, cinemascope, moody, epic, gorgeous, "
        "film grain, grainy",
        "best quality, high quality, cinematic film still, Close-up of a man, wearing tattered sailor clothes.'s face."
        " . shallow depth of field, vignette, highly detailed, high budget, bokeh, cinemascope, moody, epic, gorgeous, "
        "film grain, grainy",
    )
    assert story.final_prompts("realistic")[0] == (
        "best quality, high quality, a man, wearing tattered sailor clothes. walks in the forest."
    )
    assert story.final_prompts("comic")[0] == (
        "best quality, high quality, comic a man, wearing tattered sailor clothes. walks in the forest. . graphic "
        "illustration, comic art, graphic novel art, vibrant, highly detailed"
    )


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_without_style_and_characters_prompts_stay(prompts: list[str]) -> None:
    story = Story.from_prompts(prompts)
    assert story.final_prompts("none") == story.final_prompts() == tuple(prompt.strip() for prompt in prompts)


WORDS = st.text("abXYé1_", min_size=1, max_size=3)


@given(st.dictionaries(WORDS, TEXTS, max_size=4), st.lists(WORDS, min_size=1, max_size=8), st.sampled_from(" .,-'"))
def test_names_are_replaced_word_by_word(characters: dict[str, str], words: list[str], between: str) -> None:
    story = Story((between.join(words),), characters=characters)
    expected = between.join(characters.get(word, word).strip() for word in words)
    assert story.final_prompts("none") == (expected,)


@pytest.mark.parametrize(
    ("characters", "prompt", "expected"),
    [
        ({"Ann": "a girl", "Ann Lee": "a woman"}, "Ann Lee meets Ann", "a woman meets a girl"),
        ({"A": "B", "B": "A"}, "A sees B", "B sees A"),
        ({"Ann": "a girl"}, "Anna and joann and ann and Ann1 and _Ann", "Anna and joann and ann and Ann1 and _Ann"),
        ({"R2.D2": r"a \1 robot"}, "R2.D2 and R2xD2", r"a \1 robot and R2xD2"),
        ({"Dr. No (old)": "a man"}, "see Dr. No (old)!", "see a man!"),
        ({"Zo\u00eb": "a girl"}, "Zoe\u0308 and Zoe\u0308s", "a girl and Zo\u00ebs"),  # composed, and not
        ({"Zoe\u0308": "a girl"}, "Zo\u00eb runs", "a girl runs"),
        ({"\u5c0f\u7ea2": "a girl"}, "\u5c0f\u7ea2\u5728\u68ee\u6797\u91cc", "a girl\u5728\u68ee\u6797\u91cc"),
        ({"Anna": "a girl"}, "\u898b\u3066Anna\u3055\u3093", "\u898b\u3066a girl\u3055\u3093"),
        ({"\ubbfc\uc218": "a boy"}, "\ubbfc\uc218\uac00 \uc6c3\ub294\ub2e4", "a boy\uac00 \uc6c3\ub294\ub2e4"),
        # a vowel sign that changes the name's last letter
        (
            {"\u0930\u093e\u092e": "a man"},
            "\u0930\u093e\u092e\u093e \u0930\u093e\u092e",
            "\u0930\u093e\u092e\u093e a man",
        ),
        ({"\u0e01": "x"}, "\u0e01\u0e34 \u0e01", "\u0e01\u0e34 x"),
    ],
)
def test_names(characters: dict[str, str], prompt: str, expected: str) -> None:
    assert Story((prompt,), characters=characters).final_prompts("none") == (expected,)


def test_a_story_does_not_change_with_the_mapping_it_was_made_from() -> None:
    characters = {"Ann": "a girl"}
    story = Story(("Ann",), characters=characters)
    characters["Ann"] = "a boy"
    assert story.final_prompts("none") == ("a girl",)


def test_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    written(folder, "a cat.txt", "from the file\n")
    written(folder, "no suffix", "one\n\n two \n")
    assert Story.from_arguments(["a cat.txt"]).prompts == ("from the file",)
    assert Story.from_arguments(["no suffix"]).prompts == ("one", "two")
    assert Story.from_arguments(["a cat"]).prompts == ("a cat",)
    assert Story.from_arguments(["a cat.txt", "b.yaml"]).prompts == ("a cat.txt", "b.yaml")
    assert Story.from_arguments(["x" * 5000]).prompts == ("x" * 5000,)
    assert Story.from_arguments(["fox."]).prompts == ("fox.",)
    assert Story.from_arguments(["a fox and/or an owl, no.8"]).prompts == ("a fox and/or an owl, no.8",)
    for name in ("gone.yaml", "gone.yml", "gone.json", "gone.csv", "gone.txt", "GONE.TXT", "gone.yml2", "tales/gone"):
        text = message(Story.from_arguments, [name])
        assert text.startswith(f"{name}: no such file, expected a story")
        assert "--prompt" in text


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], "the story is empty, expected one prompt per frame; type --prompt TEXT"),
        (["a", "  \t\n"], "prompt 2 is only white space, expected words"),
        ([""], "prompt 1 is empty, expected words"),
        (["a", None], "prompt 2 is empty, expected words"),
        (["a", 3], "prompt 2 is a number (3), expected text"),
        ("abc", "'prompts' is text, expected a list"),
        (["a\0b"], "prompt 1 holds U+0000"),
        (["a", "\udcff"], "prompt 2 holds U+DCFF"),
    ],
)
def test_bad_prompts(prompts: list[str], expected: str) -> None:
    assert message(Story.from_prompts, prompts).startswith(expected)


def test_unknown_style() -> None:
    expected = "unknown style 'Comik', expected comic, film, realistic or none; did you mean 'comic'?"
    assert message(check_style, "Comik") == expected
    assert message(Story.from_prompts(["a"]).final_prompts, "Comik") == expected
    assert "did you mean" not in message(check_style, "zzz")


def test_unknown_key(folder: Path) -> None:
    path = written(folder, "a.yaml", "prompts: [a]\nstile: comic\n")
    assert message(Story.from_file, path).endswith("did you mean 'style'?")  # title is as close
    assert check_style("film") == "film"


BAD_FILES = [
    ("a.yaml", "style: comik\nprompts: [a]", "a.yaml, line 1: unknown style 'comik', expected comic, film, realistic"),
    ("a.yaml", "prompts:\n - ok\n - A man: walks\n", "a.yaml, line 3: prompt 2 is a mapping, expected text, or a map"),
    ("a.yaml", "prompts:\n - 1984\n", "a.yaml, line 2: prompt 1 is a number (1984), expected text; put it in quotes"),
    ("a.yaml", "prompts:\n - ok\n -\n", "a.yaml, line 3: prompt 2 is empty, expected words"),
    ("a.yaml", "prompts:\n - ok\n - '  '\n", "a.yaml, line 3: prompt 2 is only white space, expected words"),
    ("a.yaml", "prompts: a man", "a.yaml, line 1: 'prompts' is text, expected a list"),
    ("a.yaml", "prompts: [a]\ntitle: 3", "a.yaml, line 2: the title is a number (3), expected text"),
    ("a.yaml", "prompts: [a]\ntitle: 2024-01-01", "a.yaml, line 2: the title is a date, expected text"),
    ("a.yaml", "prompts: [a]\nstyle: [film]", "a.yaml, line 2: the style is a list, expected text"),
    ("a.yaml", "prompts: [a]\ncharacters: [b]", "a.yaml, line 2: 'characters' is a list, expected a mapping"),
    ("a.yaml", "prompts: [a]\ncharacters:\n  Bo: 1.5", "a.yaml, line 3: the definition of the character 'Bo' is a num"),
    ("a.yaml", "prompts: [a]\ncharacters:\n  No: x", "a.yaml, line 3: a character's name is a truth value (false), "),
    ("a.yaml", "prompts: [a]\ncharacters:\n  A: x\n  'A ': y", "a.yaml, line 4: the character 'A' is defined twice"),
    (
        "a.yaml",
        "promts: [a]",
        "a.yaml, line 1: unknown key 'promts', expected title, style, characters or prompts; did",
    ),
    ("a.yaml", "prompts: [a]\nprompts: [b]", "a.yaml, line 2: the key 'prompts' stands here and in line 1"),
    ("a.yaml", "prompts: [a]\ncharacters: {A: b, A: c}", "a.yaml, line 2: the key 'A' stands here and in line 2"),
    ("a.yaml", "prompts: a: b", "a.yaml, line 1, column 11: not valid YAML: mapping values are not allowed here; put "),
    ("a.yaml", "prompts: [a", "a.yaml, line 1, column 12: not valid YAML: "),
    ("a.yaml", "\tprompts: [a]", "a.yaml, line 1, column 1: not valid YAML: "),
    ("a.yaml", "title: t\nprompts: [a\x07]", "a.yaml, line 2: not valid YAML: found the character U+0007"),
    (
        "a.yaml",
        "prompts: !!python/name:os.system [a]",
        "a.yaml, line 1, column 10: not valid YAML: could not determine",
    ),
    ("a.yaml", "prompts: [2024-99-99]", "a.yaml, line 1: '2024-99-99' can't be read as timestamp"),
    ("a.yaml", "? {a: b}\n: c", "a.yaml, line 1, column 3: not valid YAML: found unhashable key"),
    ("a.yaml", "prompts: &a [*a]", "a.yaml, line 1: prompt 1 is a list, expected text"),
    ("a.yaml", "- a\n- b", "a.yaml: found a list, expected a mapping with 'prompts:'"),
    ("a.yaml", "just text", "a.yaml: found text, expected a mapping with 'prompts:'"),
    ("a.yaml", "[" * 1500, "a.yaml, line 1: values are nested more than 32 deep"),
    ("a.yaml", "", "a.yaml: the story is empty"),
    ("a.yaml", "prompts: []", "a.yaml, line 1: the story is empty"),
    ("a.yaml", "title: t\nprompts:", "a.yaml, line 2: the story is empty"),
    ("a.json", '{"prompts"\n ["a"]}', "a.json, line 2, column 2: not valid JSON: Expecting"),
    ("a.json", '{"prompts": ["a", 3]}', "a.json, line 1: prompt 2 is a number (3), expected text; put it in quotes"),
    ("a.json", '{"prompts": ["a", "\\ud800"]}', "a.json, line 1: prompt 2 holds U+D800"),
    ("a.json", '{"prompts": ["a"], "prompts": []}', "a.json, line 1: the key 'prompts' stands here and in line 1"),
    ("a.json", '["a"]', "a.json: found a list, expected a mapping"),
    ("a.json", "[" * 100_000, "a.json: values are nested too deep"),
    ("a.txt", "\n  \n", "a.txt: the story is empty"),
    ("a.txt", "one\ntwo\x1b[0m", "a.txt, line 2: prompt 2 holds U+001B"),
    ("a.txt", b"one\ncaf\xe9", "a.txt, line 2: found the byte 0xe9, expected UTF-8"),
    ("a.txt", "one".encode("utf-16"), "a.txt, line 1: found the byte 0xff, expected UTF-8"),
    ("a.txt", b"x" * 1_100_000, "a.txt is longer than 1 MiB, expected a story"),
    ("a", b"\x89PNG", "a is a PNG picture, expected a story"),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD_FILES)
def test_bad_file(folder: Path, name: str, data: str | bytes, expected: str) -> None:
    path = written(folder, name, data)
    text = message(Story.from_file, path)
    assert text.replace(str(path), name).startswith(expected)


def test_missing_file_and_folder(folder: Path) -> None:
    gone = folder / "gone.yaml"
    assert message(Story.from_file, gone).startswith(
        f"{gone}: no such file, expected a story (.yaml, .yml, .json, .csv, .tsv, .txt, .md)"
    )
    empty = folder / "empty"
    empty.mkdir()
    for call in (lambda: Story.from_file(empty), lambda: Story.from_arguments([str(empty)])):
        assert message(call).startswith(
            f"{empty} is a folder, expected a story (.yaml, .yml, .json, .csv, .tsv, .txt, .md)"
        )


def test_yaml_aliases_and_nulls(folder: Path) -> None:
    text = "title:\ncharacters: {A: &who a cat, B: *who}\nstyle: ~\nprompts: [A and B]"
    story = Story.from_file(written(folder, "a.yaml", text))
    assert story == Story(("A and B",), characters={"A": "a cat", "B": "a cat"})
    assert story.final_prompts() == ("a cat and a cat",)


def test_nothing_heavy_is_imported() -> None:
    modules = "storyadapter.method.story, storyadapter.output.run_folder"
    code = f"import sys, {modules}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
