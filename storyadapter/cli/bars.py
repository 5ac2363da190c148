"""The bars of a terminal: one for the frames that are finished, one for the steps of those that are being drawn."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from storyadapter.cli.printing import one_line
from storyadapter.cli.reporting import LineReporter, round_in_words, scale_in_words
from storyadapter.cli.status import Status
from storyadapter.method.events import Event, FrameFinished, IterationStarted, RunFinished, RunStarted, StepFinished


def terminal_console() -> Console:
    """Of standard error. Text is wrapped at words."""
    return Console(stderr=True, highlight=False)


class BarReporter(LineReporter):
    """Bars with the time left while frames are drawn; before, the status in one line that changes."""

    def __init__(self, console: Console, status: Status | None = None, *, verbose: bool = False) -> None:
        super().__init__(status, verbose=verbose)
        self._console = console
        self._progress: Progress | None = None
        self._drawn, self._steps = TaskID(0), TaskID(0)

    def line(self, text: str, *, warning: bool = False) -> None:
        self._console.print(one_line(text), markup=False, style="yellow" if warning else None)

    def event(self, event: Event, **fields: Any) -> None:
        match event:
            case RunStarted(left=left):
                super().event(event)
                self._progress = Progress(
                    SpinnerColumn(),  # a sign of life while nothing is finished
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=None),
                    MofNCompleteColumn(),
                    TimeLeftColumn(compact=True),
                    console=self._console,
                    expand=True,
                )
                self._drawn = self._progress.add_task("frames", total=left)
                self._steps = self._progress.add_task("steps", total=None, visible=False)
            case IterationStarted(iteration, scale, _) if self._progress:
                super().event(event)
                which = round_in_words(iteration, self._iterations)
                which += f", {scale_in_words(scale)}" if self._verbose else ""
                self._progress.update(self._drawn, description=f"{which}: frames")
                self._progress.start()
            case StepFinished(_, frames, step, steps) if self._progress:
                which = f"frames {frames[0]} to {frames[-1]}" if len(frames) > 1 else f"frame {frames[0]}"
                if step == 1:  # the time left is this micro-batch's own
                    self._progress.reset(self._steps, description=f"steps of {which}", total=steps, visible=True)
                self._progress.update(self._steps, completed=step)
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
