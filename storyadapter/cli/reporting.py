"""What a command tells while it works: bars on a terminal, lines elsewhere, JSON for programs, or nothing."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from storyadapter.events import (
    Event,
    FrameFinished,
    IterationFinished,
    IterationStarted,
    PromptTruncated,
    RunStarted,
    StepFinished,
)


class Reporter(Protocol):
    """Where a command's messages go."""

    def note(self, kind: str, text: str, **fields: Any) -> None:
        """One thing worth telling; `kind` and `fields` are for programs, `text` for people."""
        ...

    def stage(self, network: str, what: str) -> None:
        """A network is being worked on."""
        ...

    def bytes_read(self, done: int, total: int) -> None:
        """Weight files are being hashed."""
        ...

    def event(self, event: Event) -> None:
        """The run went on."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def reporter_for(args: argparse.Namespace) -> Reporter:
    """The reporter that --quiet and --json-log ask for."""
    if args.quiet:
        return SilentReporter()
    return JsonReporter() if args.json_log else TerminalReporter()


class SilentReporter:
    """Tells nothing."""

    def note(self, kind: str, text: str, **fields: Any) -> None: ...

    def stage(self, network: str, what: str) -> None: ...

    def bytes_read(self, done: int, total: int) -> None: ...

    def event(self, event: Event) -> None: ...

    def close(self) -> None: ...


class JsonReporter:
    """One JSON object per line on standard output; pictures are named, not written."""

    def note(self, kind: str, text: str, **fields: Any) -> None:
        self._print({"event": kind, "text": text, **fields})

    def stage(self, network: str, what: str) -> None:
        self._print({"event": "stage", "network": network, "text": what})

    def bytes_read(self, done: int, total: int) -> None:
        if done == total:
            self._print({"event": "weights_read", "bytes": total})

    def event(self, event: Event) -> None:
        fields = {name: value for name, value in vars(event).items() if name != "picture"}
        self._print({"event": _snake(type(event).__name__), **fields})

    def close(self) -> None: ...

    def _print(self, value: Mapping[str, Any]) -> None:
        print(json.dumps(value, default=_plain, ensure_ascii=False), flush=True)


class TerminalReporter:
    """Bars with the time left on a terminal; a line per iteration where standard error is none."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._done = 0
        self._frames_in_batch = 0

    def note(self, kind: str, text: str, **fields: Any) -> None:
        self._console.print(text, markup=False, style="yellow" if kind == "warning" else None)

    def stage(self, network: str, what: str) -> None:
        if network:
            self.note("stage", f"  {network.replace('_', ' ')}: {what}")

    def bytes_read(self, done: int, total: int) -> None:
        task = self._task("reading weights", total >> 20, "MB")
        self._progress_bar().update(task, completed=done >> 20)
        if done == total:
            self.close()

    def event(self, event: Event) -> None:
        match event:
            case PromptTruncated(frame, words):
                self.note("warning", f'frame {frame}: the prompt is over 77 tokens; cut off: "{words}"')
            case RunStarted(frames, iterations, first, _):
                if self._console.is_terminal:
                    self._task("iterations", iterations, "")
                    self._task("frames", frames * (iterations - first), "")
                    self._task("steps", 0, "")
                    self._progress_bar().update(self._tasks["iterations"], completed=first)
            case StepFinished(_, frames, step, steps) if self._progress:
                bar = self._progress
                bar.update(self._tasks["steps"], total=steps, completed=step)
                # frames move with every step, so that the time left is an estimate from all that was done
                bar.update(self._tasks["frames"], completed=self._done + len(frames) * step / steps)
                self._frames_in_batch = len(frames)
            case FrameFinished():
                self._done += 1
            case IterationStarted(iteration, scale) if not self._progress:
                self.note("iteration", f"iteration {iteration}, {scale_in_words(scale)}")
            case IterationFinished(iteration, seconds):
                if self._progress:
                    self._progress.update(self._tasks["iterations"], completed=iteration + 1)
                else:
                    self.note("iteration", f"iteration {iteration} done in {duration(sum(seconds.values()))}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def _progress_bar(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:>15}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeLeftColumn(),
                console=self._console,
            )
            self._progress.start()
        return self._progress

    def _task(self, name: str, total: int, unit: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress_bar().add_task(f"{name} {unit}".strip(), total=total)
        return self._tasks[name]


def scale_in_words(scale: float | None) -> str:
    return "text only" if scale is None else f"λ {scale:.3g}"


def duration(seconds: float) -> str:
    """ "8 s", "3 min 5 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def print_result(text: str) -> None:
    """The result of a command, on standard output."""
    print(text, file=sys.stdout, flush=True)
