"""The bars of a terminal, and how long things take in words."""

import io
import re

import pytest
from PIL import Image
from rich.console import Console

from storyadapter.cli.reporting import BarReporter, LineReporter, count, duration
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


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    reporter = BarReporter(Console(file=screen, force_terminal=True, highlight=False, width=120))
    picture = Image.new("RGB", (8, 8))
    batches = split_evenly(3, 2)

    def shown() -> str:
        """The text of the bars as they are drawn last."""
        reporter._progress.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
        return " ".join(re.sub("[━╸╺]+", "", text).split())

    reporter.stage("text_encoder_2", "loading weights")
    assert shown().endswith("text encoder 2: loading weights 0/? 0:00:00 left")
    reporter.note("plan", "the plan [3 frames]")
    reporter.event(RunStarted(3, 3, 1, batches, left=6))  # resumed: one of three iterations is finished
    reporter.event(PromptTruncated(2, "the end [of it]"))
    reporter.event(MicroBatchHalved(1, range(0, 3), 2))
    for iteration, scale in ((1, 0.3), (2, 0.5)):
        reporter.event(IterationStarted(iteration, scale))
        for batch in batches:
            for step in (1, 2, 3, 4):
                reporter.event(StepFinished(iteration, batch, step, 4))
                if (iteration, batch[0], step) == (1, 0, 2):
                    bars = r"iteration 1, λ 0.3 0/2 # left frames 1/6 # left steps of frames 0 to 1 2/4 # left$"
                    assert re.search(bars.replace("#", r"\S+ \S+"), shown())
            for frame in batch:
                reporter.event(FrameFinished(iteration, frame, scale, picture))
        reporter.event(IterationFinished(iteration, {"denoise": 1.0}))
    assert re.search(
        r"iteration 2, λ 0.5 2/2 \S+ 0:00:00 left frames 6/6 \S+ 0:00:00 left steps of frame 2 4/4 \S+ 0:00:00 left$",
        shown(),
    )
    assert "the plan [3 frames]" in screen.getvalue()
    assert 'warning: frame 2: the prompt is over 77 tokens; cut off: "the end [of it]"' in screen.getvalue()
    assert "warning: iteration 1: out of memory with 3 frames at once; going on with 2" in screen.getvalue()
    reporter.event(RunFinished({"denoise": 2.0}))
    reporter.result("drawn", "out/contact-sheet.png")
    reporter.close()
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
        "iteration 0, text only: 3 frames in 0.0 s",
    ]
