"""Stories of every form through the program: drawn, checked, made into a book."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.cli.options import STORY_HELP
from storyadapter.method.story import story_schema
from tests.storyadapter.cli.running import Type


def text_of(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


def test_words_of_all_kinds_are_drawn(type_in: Type, quick_run: list[str], tmp_path: Path) -> None:
    """Right to left, combining, without spaces, and far too long; with seeds and negative prompts of their own."""
    rows = [
        "prompt;negative;seed",
        "שלום עולם;;",
        "مرحبا Zoe\u0308 \U0001f98a\u200d\U0001f98a;snow;7",
        "我们在森林里读书;;9",
        f"{'w' * 100_000};{'n ' * 50_000};",
    ]
    Path("tale.csv").write_text("\n".join(rows), encoding="utf-8")
    place = quick_run.index("--prompt")
    words = [*quick_run[:place], *quick_run[place + 4 :], "--iterations", "0", "--steps", "1", "--guidance", "2"]
    done = type_in(*words, "--story", "tale.csv")
    assert done.code == 2 and not Path("out").exists()
    assert re.search(r"frame 3: a text of [\d,]+ tokens fills \d+ chunks; expected at most 16; --prompt-ch", done.err)
    words += ["--prompt-chunks", "1"]
    done = type_in(*words, "--story", "tale.csv", "--animation", "webp")
    assert done.code == 0, done.err
    assert len(done.err) < 5000
    assert 'warning: frame 3: the prompt is over 77 tokens; cut off: "wwww' in done.err
    assert 'warning: frame 3: the negative prompt is over 77 tokens; cut off: "n n' in done.err
    assert max(path.stat().st_size for path in Path("out").rglob("*.png")) < 100_000
    told = [text_of(f"out/frames/{frame:03d}.png") for frame in range(4)]
    assert [text["seed"] for text in told] == ["7", "7", "9", "7"]
    assert told[1]["negative_prompt"] == "snow" and told[0]["negative_prompt"].startswith("monochrome")
    assert len(told[3]["prompt"]) == 4001
    record = json.loads(Path("out/story.json").read_text(encoding="utf-8"))
    assert record["identity"]["story"]["prompts"][2] == {"prompt": "我们在森林里读书", "seed": 9}
    with Image.open("out/story.webp") as moving:
        assert moving.format == "WEBP" and moving.n_frames > 1
    assert type_in(*words, "--story", "tale.csv", "--resume").code == 0

    done = type_in("book", "out", "--format", "cbz")
    assert (done.code, done.out) == (0, "out/book.cbz (4 pages)\n")
    assert type_in("book", "out").out == "out/book.html (4 pages)\n"
    assert type_in("book", ".").err == (
        "storyadapter-trt: error: story.json can't be read: No such file or directory; expected the record of a "
        "storyadapter-trt run; choose another folder with --out\n"
    )


def test_what_a_story_will_be_is_told(type_in: Type, tiny_model: list[str]) -> None:
    Path("tale.yaml").write_text(
        "style: none\ncharacters: {Ada: a girl, Bob: a boy}\nprompts:\n- Ada sees ada\n"
        "- {prompt: '(snow:1.2)', seed: 5, negative: fog}\n- " + "word " * 90
    )
    done = type_in(
        *("story", "check", "tale.yaml", *tiny_model, "--iterations", "1", "--steps", "3", "--prompt-chunks", "1")
    )
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"3 frames, style none, tokens of {tiny_model[1]}"
    assert lines[1].startswith("frame 0: ") and lines[1].endswith(" of 77 tokens; characters Ada")
    assert lines[2] == "  a girl sees ada"
    assert lines[3].startswith("frame 1: ") and lines[3].endswith(" of 77 tokens; seed 5")
    assert lines[4:6] == ["  (snow:1.2)", "  negative prompt: fog"]
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert [warning[:60] for warning in warnings] == [
        "warning: no prompt names the character 'Bob'; names are foun",
        "warning: '(snow:1.2)' in prompt 2 is drawn as words; weights",
        'warning: frame 2: the prompt is over 77 tokens; cut off: "wo',
    ]
    assert lines[-1] == "2 iterations of 3 steps, guided: 36 UNet rows"
    assert sorted(path.name for path in Path().iterdir()) == ["tale.yaml"]


def test_the_schema_is_printed(type_in: Type) -> None:
    assert json.loads(type_in("story", "schema").out) == story_schema()


def test_a_story_from_standard_input(type_in: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1. a fox\n2. an owl\n")))
    done = type_in("story", "check", "-", "--style", "none")
    assert done.code == 0 and "  a fox\n" in done.out and "  an owl\n" in done.out
    assert "warning: standard input: read as a numbered list; numbers and emphasis are no part of" in done.out
    assert "- for standard input" in STORY_HELP
