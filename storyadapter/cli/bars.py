"""The bars of a terminal: one for the frames that are finished, one for the steps of those that are being drawn."""

import sys
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from storyadapter.cli.printing import one_line
from storyadapter.cli.reporting import LineReporter, round_in_words, scale_in_words
from storyadapter.cli.status import Status
from storyadapter.method.events import Event, FrameFinished, IterationStarted, RunFinished, RunStarted, StepFinished


def terminal_console() -> Console:
    """Of standard error. Text is wrapped at words."""
    return Console(stderr=True, highlight=False)


class _TimeLeft(ProgressColumn):
    """By all that was done so far; frames are finished many at once, so theirs counts the steps between."""

    def render(self, task: Task) -> Text:
        work = task.fields.get("work", task.completed)
        if not work or task.total is None or task.elapsed is None:
            return Text("--:--")
        minutes, seconds = divmod(round(task.elapsed / work * max(0.0, task.total - work)), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}")


class BarReporter(LineReporter):
    """Bars with the time left while frames are drawn; before, the status in one line that changes."""

    def __init__(self, console: Console, status: Status | None = None, *, verbose: bool = False) -> None:
        super().__init__(status, verbose=verbose)
        self._console = console
        self._progress: Progress | None = None
        self._drawn, self._steps = TaskID(0), TaskID(0)
        self._denoised = 0

    def line(self, text: str, *, warning: bool = False) -> None:
        self._console.print(one_line(text), markup=False, style="yellow" if warning else None)

    def result(self, kind: str, text: str, **fields: Any) -> None:
        if sys.stdout.isatty():
            text = fill(text, self._console.width, break_long_words=False, break_on_hyphens=False)
        super().result(kind, text, **fields)

    def event(self, event: Event, **fields: Any) -> None:
        match event:
            case RunStarted(left=left):
                super().event(event)
                self._progress = Progress(
                    SpinnerColumn(),  # a sign of life while nothing is finished
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=None),
                    MofNCompleteColumn(),
                    _TimeLeft(),
                    console=self._console,
                    expand=True,
                )
                self._drawn = self._progress.add_task("frames", total=left, start=False)
                self._steps = self._progress.add_task("steps", total=None, visible=False)
            case IterationStarted(iteration, scale, _) if self._progress:
                super().event(event)
                which = round_in_words(iteration, self._iterations)
                which += f", {scale_in_words(scale)}" if self._verbose else ""
                self._progress.update(self._drawn, description=f"{which}: frames")
                self._progress.start()
                self._progress.start_task(self._drawn)  # the first time counts
            case StepFinished(_, frames, step, steps) if self._progress:
                which = f"frames {frames[0]} to {frames[-1]}" if len(frames) > 1 else f"frame {frames[0]}"
                if step == 1:  # the time left is this micro-batch's own
                    self._progress.reset(self._steps, description=f"steps of {which}", total=steps, visible=True)
                self._progress.update(self._steps, completed=step)
                self._progress.update(self._drawn, work=self._denoised + len(frames) * step / steps)
                if step == steps:  # they are decoded while the next ones are denoised
                    self._denoised += len(frames)
            case FrameFinished() if self._progress:
                self._progress.advance(self._drawn)
            case RunFinished():
                self.close()
            case _:
                super().event(event)

    def close(self) -> None:
        super().close()
        if self._progress:
            self._progress.stop()
            self._progress = None
