"""What a command tells while it works: bars on a terminal, lines elsewhere, JSON for programs, or nothing."""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from storyadapter.method.constants import TEXT_TOKENS
from storyadapter.method.errors import RunError
from storyadapter.method.events import (
    Event,
    IterationFinished,
    IterationStarted,
    MicroBatchHalved,
    PromptTruncated,
    RunStarted,
    StepFinished,
)


class Reporter:
    """Where a command's messages go: this one tells nothing."""

    def note(self, kind: str, text: str, **fields: Any) -> None:
        """One thing worth telling; `kind` and `fields` are for programs, `text` for people."""

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """What the command has made, at its end; goes to standard output."""

    def stage(self, network: str, what: str) -> None:
        """A network is being worked on."""

    def fraction(self, network: str, done: float) -> None:
        """A network's engine is being built: 0 to 1."""

    def bytes_read(self, done: int, total: int) -> None:
        """Weight files are being hashed."""

    def event(self, event: Event) -> None:
        """The run went on."""

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""


def reporter_for(args: argparse.Namespace) -> Reporter:
    """The reporter that --quiet and --json-log ask for."""
    if args.quiet:
        return Reporter()
    if args.json_log:
        return JsonReporter()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return BarReporter(console) if console.is_terminal else LineReporter()


class JsonReporter(Reporter):
    """One JSON object per line on standard output; pictures are named, not written."""

    def note(self, kind: str, text: str, **fields: Any) -> None:
        self._print({"event": kind, "text": text, **fields})

    result = note

    def stage(self, network: str, what: str) -> None:
        self._print({"event": "stage", "network": network, "text": what})

    def fraction(self, network: str, done: float) -> None:
        self._print({"event": "building", "network": network, "done": round(done, 3)})

    def bytes_read(self, done: int, total: int) -> None:
        if done == total:
            self._print({"event": "weights_read", "bytes": total})

    def event(self, event: Event) -> None:
        fields = {name: value for name, value in vars(event).items() if name not in ("picture", "embedding")}
        self._print({"event": _snake(type(event).__name__), **fields})

    def _print(self, value: Mapping[str, Any]) -> None:
        print_result(json.dumps(value, default=_plain, ensure_ascii=False))


class LineReporter(Reporter):
    """A line per network and iteration on standard error, for log files."""

    def __init__(self) -> None:
        self._total = 0
        self._done = 0
        self._frames = 0
        self._scale: float | None = None
        self._started = 0.0
        self._iteration_started = 0.0

    def note(self, kind: str, text: str, **fields: Any) -> None:
        print(f"warning: {text}" if kind == "warning" else text, file=sys.stderr, flush=True)

    def result(self, kind: str, text: str, **fields: Any) -> None:
        print_result(text)

    def stage(self, network: str, what: str) -> None:
        if network:
            self.note("stage", f"  {_words(network)}: {what}")

    def bytes_read(self, done: int, total: int) -> None:
        if done == total:
            self.note("weights_read", f"hashed {total / 2**20:,.0f} MiB of weights, once")

    def event(self, event: Event) -> None:
        match event:
            case PromptTruncated():
                self.note("warning", truncation_in_words(event))
            case RunStarted(frames, iterations, first, _):
                self._frames, self._total, self._started = frames, iterations - first, time.perf_counter()
            case IterationStarted(_, scale, _):
                self._scale, self._iteration_started = scale, time.perf_counter()
            case MicroBatchHalved():
                self.note("warning", halving_in_words(event))
            case IterationFinished(iteration):
                self._done += 1
                text = f"iteration {iteration}, {scale_in_words(self._scale)}: {count(self._frames, 'frame')} in "
                text += duration(time.perf_counter() - self._iteration_started)
                if left := self._total - self._done:
                    text += f", about {duration((time.perf_counter() - self._started) / self._done * left)} left"
                self.note("iteration", text)


class BarReporter(Reporter):
    """Bars with the time left: one while networks are read or built; iterations, frames and steps while drawing."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._frames = 0
        self._frames_done = 0

    def note(self, kind: str, text: str, **fields: Any) -> None:
        warning = kind == "warning"
        self._console.print(f"warning: {text}" if warning else text, markup=False, style="yellow" if warning else None)

    def result(self, kind: str, text: str, **fields: Any) -> None:
        self.close()
        print_result(text)

    def stage(self, network: str, what: str) -> None:
        if network:
            bar, task = self._bar("networks", transient=True)
            bar.reset(task, description=f"{_words(network)}: {what}")

    def fraction(self, network: str, done: float) -> None:
        bar, task = self._bar("networks", transient=True)
        bar.update(task, total=100, completed=round(100 * done))

    def bytes_read(self, done: int, total: int) -> None:
        bar, task = self._bar("hashing weights, once (MiB)", total >> 20, transient=True)
        bar.update(task, completed=done >> 20)
        if done == total:
            self.close()

    def event(self, event: Event) -> None:
        match event:
            case PromptTruncated():
                self.note("warning", truncation_in_words(event))
            case MicroBatchHalved():
                self.note("warning", halving_in_words(event))
            case RunStarted(frames, iterations, first, _, _, left):
                self.close()
                self._frames = frames
                self._bar("iterations", iterations - first)
                self._bar("frames", left)
            case IterationStarted(iteration, scale, _):
                bar, task = self._bar("iterations")
                bar.update(task, description=f"iteration {iteration}, {scale_in_words(scale)}")
            case StepFinished(_, frames, step, steps):
                self._advance(self._frames_done + len(frames) * step / steps)
                bar, task = self._bar("steps", steps)
                which = f"frames {frames[0]} to {frames[-1]}" if len(frames) > 1 else f"frame {frames[0]}"
                if step == 1:
                    bar.reset(task, description=f"steps of {which}")  # the time left is this micro-batch's own
                bar.update(task, completed=step)
                if step == steps:  # they are decoded while the next ones are denoised
                    self._frames_done += len(frames)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def _advance(self, frames: float) -> None:
        """Frames and iterations move with every step, so that their time left is known early."""
        for name, unit in (("frames", 1), ("iterations", self._frames)):
            bar, task = self._bar(name)
            bar.update(task, completed=frames / unit)

    def _bar(self, name: str, total: int | None = None, *, transient: bool = False) -> tuple[Progress, TaskID]:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeLeftColumn(),
                TextColumn("left"),
                console=self._console,
                transient=transient,
            )
            self._progress.start()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        return self._progress, self._tasks[name]


def truncation_in_words(event: PromptTruncated) -> str:
    return f'frame {event.frame}: the prompt is over {TEXT_TOKENS} tokens; cut off: "{event.words}"'


def halving_in_words(event: MicroBatchHalved) -> str:
    which = count(len(event.frames), "frame")
    return f"iteration {event.iteration}: out of memory with {which} at once; going on with {event.max_frames}"


def scale_in_words(scale: float | None) -> str:
    return "text only" if scale is None else f"λ {scale:.3g}"


def count(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """ "1.5 s", "3 min 5 s" or "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def print_result(text: str) -> None:
    """Print to standard output, at once.

    Raises:
        BrokenPipeError: its reader went away.
        RunError: it can't be written, as when it goes to a file on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"standard output can't be written: {error.strerror}") from error


def _words(network: str) -> str:
    return network.replace("_", " ")


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
