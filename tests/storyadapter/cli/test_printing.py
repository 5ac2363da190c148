"""Foreign text on its way to a terminal, a log or a program."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from storyadapter.cli.bars import BarReporter
from storyadapter.cli.json_log import JsonReporter
from storyadapter.cli.printing import MAX_LETTERS, json_line, one_line, print_result, visible
from storyadapter.cli.reporting import LineReporter
from storyadapter.method.errors import InputError
from storyadapter.method.events import PromptTruncated
from tests.storyadapter.cli.running import Type

EVIL = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\n\u202eback\u2066\x7f\udcff"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\x9b2J\r\n\u202eback\u2066\x7f\udcff"


@given(st.text(st.characters(), max_size=60))
def test_nothing_acts_on_a_terminal(text: str) -> None:
    for shown in (one_line(text), visible(text), json_line({"text": text})):
        assert shown.isprintable() or not any(char in shown for char in EVIL if not char.isprintable())
        assert "\x1b" not in shown and "\n" not in shown and "\x9b" not in shown
        shown.encode()
    assert json.loads(json_line([text])) == [text]


def test_letters_of_all_scripts_stay() -> None:
    text = "é ß Привет שלום مرحبا 我们 🦊\u200d🦊"
    assert one_line(text) == visible(text) == text


def test_one_line_is_bounded() -> None:
    long = "x" * 1_000_000
    assert len(one_line(long)) < MAX_LETTERS + 50 and "(997,000 letters)" in one_line(long)
    assert len(json_line({"text": long, "list": [long]})) < 2 * MAX_LETTERS + 100


def test_every_way_out_is_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    for reporter in (LineReporter(), BarReporter(Console(file=screen, width=400))):
        reporter.note("warning", EVIL)
        reporter.event(PromptTruncated(0, EVIL))
    assert screen.getvalue().count(SHOWN) == capsys.readouterr().err.count(SHOWN) == 2
    reporter = JsonReporter("run")
    reporter.note("warning", EVIL)
    reporter.event(PromptTruncated(0, EVIL))
    _, first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first)["text"] == json.loads(second)["words"] == EVIL
    assert "\x9b" not in first + second and "\u202e" not in first
    print_result(f"{EVIL}\nsecond")
    assert capsys.readouterr().out == SHOWN.replace(r"\n", "\n") + "\nsecond\n"


def test_an_error_is_filtered(type_in: Type) -> None:
    done = type_in("run", "--story", "\x1b[31mgone.yaml")
    assert done.code == 2 and r"\x1b[31mgone.yaml: no such file" in done.err and "\x1b" not in done.err


def test_what_is_cut_off_is_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter()
    reporter.event(PromptTruncated(3, "w" * 1000))
    reporter.event(PromptTruncated(None, "the end", negative=True))
    first, second = capsys.readouterr().err.splitlines()
    assert first == f'warning: frame 3: the prompt is over 77 tokens; cut off: "{"w" * 300}… (700 letters more)"'
    assert second == 'warning: the negative prompt is over 77 tokens; cut off: "the end"'


def test_errors_are_one_line(type_in: Type, tmp_path: Path) -> None:
    Path("tale.yaml").write_text("title: [x]\nprompts: ['" + "x" * 100_000 + "']")
    done = type_in("run", "--story", "tale.yaml")
    assert done.code == 2 and done.err.endswith("\n") and len(done.err.splitlines()[-1]) < 300
    assert str(InputError("a\nb")) == "a\nb" and one_line("a\nb") == r"a\nb"
