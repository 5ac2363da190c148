"""Story files of every form, and whatever else may lie under their names."""

import csv
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from storyadapter.method import story as story_module
from storyadapter.method.errors import InputError, spelled
from storyadapter.method.story import Story, story_schema

NUMBERED = "read as a numbered list; numbers and emphasis are no part of the prompts"
BULLETED = "read as a bulleted list; bullets and emphasis are no part of the prompts"
FENCED = "what stands between the fences is read; lines left out: {}"
LIKE = "read as {}, as it looks like that"
MERGES = "\n".join(
    ["a0: &a0 {k: x}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], b{n}: x}}" for n in range(1, 40)), "prompts: [x]"]
)
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 5000))
# what explodes while it is read, or what parsers stumble over -> the reason
HOSTILE = {
    "merges.yaml": (MERGES, "line 41: aliases and merges make more than 50,000 values of it; expected a story"),
    "aliases.yaml": (ALIASES, "line 10: aliases and merges make more than 50,000 values of it; expected a story"),
    "chain.yaml": (CHAIN, "line 5001: aliases and merges make more than 50,000 values of it; expected a story"),
    "deep.yaml": ("[" * 100_000, "line 1: values are nested more than 32 deep; expected a story"),
    "keys.yaml": ("? " * 100_000, "line 1: values are nested more than 32 deep; expected a story"),
    "hex.yaml": (f"prompts: [0x{'f' * 4000}]", "line 1: 4,002 letters that read as int, expected 40 or fewer; put "),
    "sixty.yaml": (
        f"prompts:\n- {'1:' * 500}1",
        "line 2: 1,001 letters that read as int, expected 40 or fewer; put te",
    ),
    "empty.yaml": ('prompts:\n- !!int ""', "line 2: '' can't be read as int; put text in quotes"),
    "truth.yaml": ("prompts: [!!bool maybe]", "line 1: 'maybe' can't be read as bool; put text in quotes"),
    "set.yaml": ("prompts: !!set {a}", "line 1: 'prompts' is a set, expected a list with one text per frame"),
    "pairs.yaml": (
        "prompts: !!pairs [a]",
        "line 1, column 19: not valid YAML: expected a mapping of length 1, but found",
    ),
    "deep.json": ("[" * 1_000_000, "values are nested too deep; expected a story"),
    "many.json": (f'{{"prompts": [{"1," * 200_000}1]}}', "line 1: more than 50,000 values; expected a story"),
    "keys.json": (json.dumps(dict.fromkeys(map(str, range(60_000)))), "line 1: more than 50,000 values; expected"),
    "digits.json": (
        f'{{"prompts":\n[{"7" * 5000}]}}',
        "line 2: a number of 5,000 digits, expected 40 or fewer; put te",
    ),
    "frames.txt": ("a\n" * 10_001, "the story has 10,001 prompts, expected 10,000 at the most"),
    "names.json": (
        json.dumps({"prompts": ["a"], "characters": {f"n{n}": "x" for n in range(1001)}}),
        "line 1: 'characters' has 1,001 names, expected 1,000 at the most",
    ),
    "name.yaml": (
        f"prompts: [a]\ncharacters:\n  {'n' * 61}: x",
        f"line 3: the character '{'n' * 60}…' has a name of 61 letters, expected 60 at the most",
    ),
    "field.csv": (f"prompt\n{'x' * 200_000}", "line 2: not valid CSV: field larger than field limit (131072)"),
    "quote.csv": ('prompt\n"a fox', "line 2: not valid CSV: unexpected end of data"),
    "cells.csv": (
        "prompt\na fox, red\n",
        "line 2: 2 cells under a header of 1, expected as many; put text that holds th",
    ),
    "header.csv": (
        "a fox,an owl\nb,c",
        "line 1: found the columns 'a fox', 'an owl', expected a header with prompt, or",
    ),
    "twice.csv": ("prompt,Prompts\na,b", "line 1: the column 'Prompts' stands twice, expected once"),
    "seed.csv": ("prompt,seed\na,-1", "line 2: the seed of prompt 1 is text, expected a number from 0 to 2^63 - 1"),
    "control.csv": ("prompt;control;Control 1\na;b;c", "line 1: the column 'Control 1' stands twice, expected once"),
    "seed.yaml": (
        "prompts:\n- prompt: a\n  seed: 1.5",
        "line 3: the seed of prompt 1 is a number (1.5), expected a numbe",
    ),
    "seed.json": (
        '{"prompts": [{"prompt": "a",\n"seed": -1}]}',
        "line 2: the seed of prompt 1 is -1, expected 0 to 2^63",
    ),
    "negative.yaml": (
        "prompts: [{prompt: a, negative: 3}]",
        "line 1: the negative prompt of prompt 1 is a number (3), e",
    ),
    "control.yaml": (
        "prompts:\n- a\n- {prompt: b, control: 3}",
        "line 3: the control of prompt 2 is a number (3), expected the path of a picture, or a list with one per Cont",
    ),
    "controls.yaml": ("prompts: [{prompt: b, control: [null]}]", "line 1: the control of prompt 1 is a list, exp"),
    "references.yaml": (
        "prompts: [{prompt: b, references: c}]",
        "line 1: the references of prompt 1 is text, expected a list with one file per picture",
    ),
    "reference.yaml": (
        "prompts: [a]\ncharacters:\n  A: {references: [7]}",
        "line 3: the references of the character 'A' is a number (7), expected text; put it in quotes",
    ),
    "many-references.yaml": (
        f"prompts: [a]\ncharacters:\n  A: {{references: [{'a, ' * 33}]}}",
        "line 3: the references of the character 'A' has 33 pictures, expected 32 at the most",
    ),
    "character.yaml": (
        "prompts: [a]\ncharacters:\n  A: {pictures: [a]}",
        "line 3: the character 'A' has the unknown key 'pictures', expected definition or references",
    ),
    "empty-character.yaml": (
        "prompts: [a]\ncharacters:\n  A: {}",
        "line 3: the definition of the character 'A' is an empty mapping, expected 'definition', 'references', or both",
    ),
    "twice.json": (
        '{"prompts": ["a"],\n"prompts": ["b"]}',
        "line 2: the key 'prompts' stands here and in line 1, expect",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_explodes_or_is_wrong_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, reason = HOSTILE[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        Story.from_file(path)
    assert time.monotonic() - started < 10
    told = str(caught.value).removeprefix(str(path))
    assert told[2:].startswith(reason), told[:300]
    assert len(told) < 500


OTHERS = {
    "tale.docx": (b"PK\x03\x04....", "a zip archive, as documents of word processors and spreadsheets are"),
    "tale.yaml": (b"%PDF-1.7", "a PDF"),
    "tale.txt": (b"\x89PNG\r\n", "a PNG picture"),
    "tale.rtf": (b"{\\rtf1", "rich text"),
    "tale.html": (b"<!doctype html>", "a web page"),
    "tale.foo": (b"a fox", "a file with the suffix '.foo'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_story_is_told_by_what_it_is(name: str, tmp_path: Path) -> None:
    data, what = OTHERS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        Story.from_file(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name} is {what}, expected a story (.yaml, .yml, .json, .csv, .tsv, .txt, .md); save the story as "
        "one of these"
    )


CHAT = """# Pip's day

Here is your story:

1. **Pip wakes up** in `bed`
   and yawns
2. Pip runs

Shall I go on?
"""
# text -> prompts or frames, and what is told
READ: dict[str, tuple[str, list[Any], list[str]]] = {
    "sheet.csv": (
        '\ufeffPrompt,Negative,Seed,Mood\r\n"a fox, red",snow,7,sad\r\nan owl,,,\r\n',
        [{"prompt": "a fox, red", "negative": "snow", "seed": 7}, "an owl"],
        ["columns that aren't used: 'Mood'"],
    ),
    "parts.csv": (
        "Character;Interaction;Scene\na fox;reads;in a forest\nan owl;;at night\n",
        ["a fox reads in a forest", "an owl at night"],
        [],
    ),
    "tabs.tsv": ("scene\tprompt\nx\ta fox\n", ["a fox"], ["columns that aren't used: 'scene'"]),
    "lines.csv": ('prompt\n"a fox\nin snow"\n\nan owl', ["a fox\nin snow", "an owl"], []),
    "chat.md": (
        CHAT,
        ["Pip wakes up in bed and yawns", "Pip runs"],
        [
            NUMBERED,
            '3 lines are left out as no prompt, first "# Pip\'s day"',
        ],
    ),
    "list.txt": ("- a fox\n- an owl\n", ["a fox", "an owl"], [BULLETED]),
    "scenes.txt": ("**Scene 1:** a fox\n**Scene 2:** an owl", ["a fox", "an owl"], [NUMBERED]),
    "plain.txt": ("a fox\n3 owls\n1. snow\nan *odd* __line__", ["a fox", "3 owls", "1. snow", "an *odd* __line__"], []),
    "fence.md": (
        "Sure!\n```yaml\nprompts:\n- a fox\n```\nBye",
        ["a fox"],
        [FENCED.format(2), LIKE.format("YAML")],
    ),
    "fences.md": (
        "```\na fox\n```\n\n```\nan owl\n reads\n```",
        ["a fox", "an owl reads"],
        ["each of the 2 fenced blocks is a prompt; lines left out: 0"],
    ),
    "fence.yaml": ("```\nprompts: [a fox]\n```", ["a fox"], [FENCED.format(0), LIKE.format("YAML")]),
    "json.txt": ('{"prompts": ["a fox"]}', ["a fox"], [LIKE.format("JSON")]),
    "table.txt": ("prompt,seed\na fox,7", [{"prompt": "a fox", "seed": 7}], [LIKE.format("CSV")]),
}


@pytest.mark.parametrize("name", READ)
def test_forms(name: str, tmp_path: Path) -> None:
    text, prompts, told = READ[name]
    path, notices = tmp_path / name, []
    path.write_text(text, encoding="utf-8", newline="")
    story = Story.from_file(path, on_notice=notices.append)
    assert story.to_dict()["prompts"] == prompts
    assert [spelled(notice) for notice in notices] == [f"{path}: {text}" for text in told]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a fox\nan owl\n")))
    assert Story.from_arguments(["-"]).prompts == ("a fox", "an owl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompts": [3]}')))
    with pytest.raises(InputError, match="^standard input, line 1: prompt 1 is a number \\(3\\), expected text"):
        Story.from_arguments(["-"])


SHOT = {
    "index": 1,
    "Shot Perspective Design": {"en": "Close-up", "ch": "特写"},
    "Plot Correspondence": {"en": "Ada finds a key", "ch": "艾达找到钥匙"},
    "Static Shot Description": {"en": "a key in a hand", "ch": "手里的钥匙"},
    "Characters Appearing": {"en": ["Ada", "Bob"], "ch": ["艾达", "鲍勃"]},
    "Setting Description": {"en": "an attic", "ch": "阁楼"},
}
VISTORYBENCH = {
    "Story_type": {"en": "Fairy tale", "ch": "童话"},
    "Shots": [SHOT],
    "Characters": {
        "Ada": {
            "name_en": "Ada",
            "name_ch": "艾达",
            "prompt_en": "a girl",
            "prompt_ch": "女孩",
            "tag": "realistic_human",
        }
    },
}


def test_a_story_folder_of_vistorybench(tmp_path: Path) -> None:
    def write(value: Any) -> None:
        (tmp_path / "story.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    write(VISTORYBENCH)
    (tmp_path / "image" / "Ada").mkdir(parents=True)
    for file in ("01.png", "00.JPG", "notes.txt"):
        (tmp_path / "image" / "Ada" / file).touch()
    (tmp_path / "outside.png").touch()
    notices = []
    story = Story.from_file(tmp_path, on_notice=notices.append)
    assert story.prompts == ("Close-up;Ada finds a key;a key in a hand;Ada is a girl;an attic;",)
    assert [spelled(notice).removeprefix(str(tmp_path)) for notice in notices] == [
        "/story.json: on stage without a description in 'en', and left out: 'Bob'",
    ]
    shown = [str(tmp_path / "image" / "Ada" / file) for file in ("00.JPG", "01.png")]
    assert [list(paths) for paths in story.references()] == [shown]
    write(VISTORYBENCH | {"Shots": [SHOT | {"Characters Appearing": {"en": ["..", "a\0b"], "ch": ["", ""]}}]})
    assert not any(Story.from_file(tmp_path).references())
    write(VISTORYBENCH)
    assert Story.from_file(tmp_path, language="ch").prompts == ("特写;艾达找到钥匙;手里的钥匙;艾达 is 女孩;阁楼;",)
    with pytest.raises(
        InputError, match="story.json, line 1: no text in 'fr' under 'Characters Appearing', expected 'en'"
    ):
        Story.from_file(tmp_path, language="fr")
    write({"identity": {}, "progress": {}})
    with pytest.raises(InputError, match="found the keys .* expected a story of ViStoryBench, with 'Shots'"):
        Story.from_file(tmp_path)


def test_the_schema_says_what_a_story_file_may_hold() -> None:
    schema = story_schema()
    published = Path(story_module.__file__).parent / "story.schema.json"  # storyadapter-trt story schema > …
    assert json.loads(published.read_text(encoding="utf-8")) == schema
    assert [*schema["properties"]] == ["prompts", "title", "style", "characters"]
    assert schema["additionalProperties"] is False and schema["properties"]["prompts"]["minItems"] == 1
    text, frame = schema["properties"]["prompts"]["items"]["anyOf"]
    assert text["type"] == "string" and frame == {"$ref": "#/$defs/Frame"}
    own = schema["$defs"]["Frame"]
    assert [*own["properties"]] == ["prompt", "negative", "seed", "control", "references"]
    assert own["required"] == ["prompt"]
    assert {"comic", "film", "realistic", "none"} == {*schema["properties"]["style"]["anyOf"][0]["enum"]}


def test_paths_of_control_pictures_are_those_beside_the_story_file(tmp_path: Path) -> None:
    path = tmp_path / "tale.yaml"
    path.write_text("prompts:\n- {prompt: a, control: poses/1.png}\n- {prompt: b, control: [/d/2.png, null]}\n- c\n")
    story = Story.from_file(path)
    assert [frame.control for frame in story.frames] == [(str(tmp_path / "poses/1.png"),), ("/d/2.png", None), None]
    assert Story(**story.to_dict()) == story
    sheet = tmp_path / "tale.csv"
    sheet.write_text("prompt,control\na,poses/1.png\nb,/d/2.png\nc\n")
    expected = [(str(tmp_path / "poses/1.png"),), ("/d/2.png",), None]
    assert [frame.control for frame in Story.from_file(sheet).frames] == expected
    sheet.write_text("Control 1;prompt;control_3\n/1.png;a\n;b;/2.png\n;c;\n")  # each of three ControlNets
    told: list[object] = []
    expected = [("/1.png", None, None), (None, None, "/2.png"), None]
    assert [frame.control for frame in Story.from_file(sheet, on_notice=told.append).frames] == expected
    assert not told
    assert Story([{"prompt": "a", "control": "poses/1.png"}]).frames[0].control == ("poses/1.png",)
    assert [frame.control for frame in story.without_control().frames] == [None] * 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), below, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["prompts", "characters", "title", "style", "prompt", "seed", "negative", "control", "references", "Shots"]
)
STORIES = st.dictionaries(KEYS, VALUES, max_size=4) | VALUES
TEXTS = st.text(st.characters(), max_size=80) | st.text("-*1.) `\n\"':,;\t{}[]&!|>%@#a", max_size=80)


def as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def as_csv(value: Any) -> str:
    file = io.StringIO()
    rows = value.items() if isinstance(value, dict) else [value if isinstance(value, list) else [value]]
    header = ["prompt", "seed", "control", "control 2"]
    csv.writer(file, delimiter=";").writerows([header, *([str(cell) for cell in row] for row in rows)])
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@given(
    st.tuples(st.sampled_from(["yaml", "json", "csv", "txt", "md"]), TEXTS)
    | st.tuples(st.just("yaml"), STORIES.map(yaml.safe_dump))
    | st.tuples(st.just("json"), STORIES.map(as_json))
    | st.tuples(st.just("csv"), STORIES.map(as_csv))
)
@settings(max_examples=200, deadline=None)
def test_anything_is_a_story_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, str]
) -> None:
    suffix, text = file
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        story = Story.from_file(path)
    except InputError as error:
        assert len(str(error)) < 1000
    else:
        assert story.frames and all(story.final_prompts("none"))
