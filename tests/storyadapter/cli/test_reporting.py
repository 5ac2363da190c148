"""The bars of a terminal, and how long things take in words."""

import io
import logging
import os
import re
import subprocess
import sys
import time
import warnings

import pytest
from PIL import Image
from rich.console import Console

from storyadapter.cli.bars import BarReporter
from storyadapter.cli.libraries import libraries_silenced, own_warnings
from storyadapter.cli.reporting import LineReporter, count, duration
from storyadapter.cli.status import Status
from storyadapter.method.events import (
    FrameFinished,
    IterationFinished,
    IterationStarted,
    MicroBatchHalved,
    PromptTruncated,
    RunFinished,
    RunStarted,
    StepFinished,
)
from storyadapter.method.plan import split_evenly


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (1.25, "1.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_count() -> None:
    assert [count(number, "frame") for number in (0, 1, 2, 1234)] == ["0 frames", "1 frame", "2 frames", "1,234 frames"]


@pytest.mark.parametrize("width", [100, 60])
def test_bars(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    reporter = BarReporter(Console(file=screen, force_terminal=True, highlight=False, width=width))
    picture = Image.new("RGB", (8, 8))
    batches = split_evenly(3, 2)

    def text() -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")

    def shown() -> str:
        """The text of the bars as they are drawn last."""
        reporter._progress.refresh()
        return " ".join(re.sub("[━╸╺⠀-⣿]+", "", text()).split())

    reporter.note("plan", "the plan [3 frames], " + "in words " * 12)
    reporter.event(RunStarted(3, 3, 1, batches, left=6))  # resumed: one of three iterations is finished
    reporter.event(PromptTruncated(2, "the end [of it]"))
    reporter.event(MicroBatchHalved(1, range(0, 3), 2))
    for iteration, scale in ((1, 0.3), (2, 0.5)):
        reporter.event(IterationStarted(iteration, scale))
        for batch in batches:
            for step in (1, 2, 3, 4):
                reporter.event(StepFinished(iteration, batch, step, 4))
                if (iteration, batch[0], step) == (1, 0, 2):
                    assert re.search(
                        r"round 2 of 3: frames 0/6 \d\d:\d\d steps of frames 0 to 1 2/4 \d\d:\d\d$", shown()
                    )
            for frame in batch:
                reporter.event(FrameFinished(iteration, frame, scale, picture))
        reporter.event(IterationFinished(iteration, {"denoise": 1.0}))
    assert re.search(r"round 3 of 3: frames 6/6 00:00 steps of frame 2 4/4 00:00$", shown())
    reporter.event(RunFinished({"denoise": 2.0}))
    reporter.result("drawn", "out/contact-sheet.png")
    reporter.close()
    words = " ".join(text().split())
    assert "the plan [3 frames], in words" in words and "round 2 of 3: 3 frames in " in words
    assert 'warning: frame 2: the prompt is over 77 tokens; cut off: "the end [of it]"' in words
    assert "warning: iteration 1: out of memory with 3 frames at once; going on with 2" in words
    assert "0/?" not in words
    assert max(len(line.rstrip()) for line in text().splitlines()) <= width
    assert not any(line.startswith("ords") for line in text().splitlines())  # wrapped at words
    assert capsys.readouterr().out == "out/contact-sheet.png\n"


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter()
    for event in (
        RunStarted(3, 1, 0, split_evenly(3, 3)),
        IterationStarted(0, None),
        MicroBatchHalved(0, range(0, 3), 2),
        IterationFinished(0, {"denoise": 100.0, "decode": 100.0}),  # stages overlap: their sum is no time
    ):
        reporter.event(event)
    assert capsys.readouterr().err.splitlines() == [
        "warning: iteration 0: out of memory with 3 frames at once; going on with 2",
        "round 1 of 1, from text alone: 3 frames in 0.0 s",
    ]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_sign_of_life(in_place: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing for what is quick; the first after a tenth of a second, later ones every two."""
    Status("starting", in_place=in_place).close()
    assert capsys.readouterr().err == ""
    status = Status("starting", in_place=in_place)
    time.sleep(0.5)
    told = capsys.readouterr().err
    assert told == ("\r\x1b[K... starting" if in_place else "... starting\n")
    status.say("opening")
    time.sleep(2.2)
    assert "... opening (" in capsys.readouterr().err
    status.close()
    assert capsys.readouterr().err == ("\r\x1b[K" if in_place else "")
    status.close()


def test_only_what_a_command_says_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """Not what other libraries warn of and log; our own warnings are."""
    handler = logging.StreamHandler()  # as PyTorch's loggers have, once its compiler is imported
    logging.getLogger("torch").addHandler(handler)
    told: list[str] = []
    with libraries_silenced(), own_warnings(told.append):
        warnings.warn("a warning", stacklevel=1)
        for name in ("transformers", "diffusers.models", "huggingface_hub", "torch", "torch._inductor", "onnxruntime"):
            logging.getLogger(name).warning("a log")
        logging.getLogger("storyadapter.engine.fingerprint").warning("%s can't be written", "a cache")
    logging.getLogger("torch").removeHandler(handler)
    assert told == ["a cache can't be written"]
    assert capfd.readouterr() == ("", "")
    assert "TQDM_DISABLE" not in os.environ


def test_no_bars_of_libraries_that_are_imported_then() -> None:
    code = """
from storyadapter.cli.libraries import libraries_silenced
with libraries_silenced():
    import tqdm, tqdm.auto, huggingface_hub.utils
    for bar in (tqdm.tqdm, tqdm.auto.tqdm, huggingface_hub.utils.tqdm):
        list(bar(range(3)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
