"""What a command tells while it works: bars on a terminal, lines elsewhere, JSON for programs, or nothing."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from storyadapter.cli.interrupts import exit_code_of, interrupts_kept
from storyadapter.cli.libraries import own_warnings
from storyadapter.cli.printing import print_result, tell
from storyadapter.cli.status import Status
from storyadapter.method import events
from storyadapter.method.constants import TEXT_TOKENS
from storyadapter.method.errors import StoryAdapterError

_WORDS_SHOWN: Final = 300  # letters of what is cut off


class Reporter:
    """Where a command's messages go: this one tells nothing."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.perf_counter() - self._began

    def note(self, kind: str, text: str, *, detail: str = "", **fields: Any) -> None:
        """One thing worth telling; `kind` and `fields` are for programs, `text` for people, `detail` with --verbose."""

    def hint(self, text: str) -> None:
        """What people may want to do next."""

    def result(self, kind: str, text: str, **fields: Any) -> None:
        """What the command has made, at its end; goes to standard output."""

    def stage(self, network: str, what: str) -> None:
        """A network is being worked on; "" for none in particular."""

    def fraction(self, network: str, done: float) -> None:
        """A network's engine is being built: 0 to 1."""

    def bytes_read(self, done: int, total: int) -> None:
        """Weight files are being hashed."""

    def event(self, event: events.Event, **fields: Any) -> None:
        """The run went on; `fields` are for programs."""

    def failed(self, error: StoryAdapterError) -> None:
        """The command ends with an error, which is told on standard error by others."""

    def stopped(self, exit_code: int, text: str) -> None:
        """The command was stopped, which is told on standard error by others."""

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""


@contextmanager
def reporting(args: argparse.Namespace) -> Iterator[Reporter]:
    """The reporter that --quiet, --json-log and --verbose ask for; what ends the command is told to it, too."""
    reporter = _reporter_for(args)
    try:
        with own_warnings(lambda text: reporter.note("warning", text)), interrupts_kept():
            yield reporter
    except StoryAdapterError as error:
        with suppress(StoryAdapterError, BrokenPipeError):  # it may be that nothing can be told any more
            reporter.failed(error)
        raise
    except KeyboardInterrupt as stop:
        with suppress(StoryAdapterError, BrokenPipeError):
            reporter.stopped(exit_code_of(stop), "; ".join(["stopped", *getattr(stop, "__notes__", ())]))
        raise
    finally:
        reporter.close()


def _reporter_for(args: argparse.Namespace) -> Reporter:
    if args.quiet:
        return Reporter()
    if args.json_log:
        from storyadapter.cli.json_log import JsonReporter

        return JsonReporter(args.command)
    terminal = sys.stderr.isatty()
    status = Status("starting", in_place=terminal)
    if not terminal:
        return LineReporter(status, verbose=args.verbose)
    from storyadapter.cli.bars import BarReporter, terminal_console  # a tenth of a second, while the status is told

    return BarReporter(terminal_console(), status, verbose=args.verbose)


class LineReporter(Reporter):
    """A line per round on standard error, for log files; before, a sign of life where nothing else is told."""

    def __init__(self, status: Status | None = None, *, verbose: bool = False) -> None:
        super().__init__()
        self._status = status
        self._verbose = verbose
        self._total = 0
        self._done = 0
        self._frames = 0
        self._iterations = 0
        self._scale: float | None = None
        self._started = 0.0
        self._iteration_started = 0.0

    def note(self, kind: str, text: str, *, detail: str = "", **fields: Any) -> None:
        if self._status:
            self._status.clear()
        self.line(f"warning: {text}" if kind == "warning" else text, warning=kind == "warning")
        if detail and self._verbose:
            self.line(detail)

    def line(self, text: str, *, warning: bool = False) -> None:
        """Print a line."""
        tell(text)

    def hint(self, text: str) -> None:
        self.note("hint", text)

    def result(self, kind: str, text: str, **fields: Any) -> None:
        self.close()
        print_result(text)

    def stage(self, network: str, what: str) -> None:
        text = f"{words_of(network)}: {what}" if network else what
        if self._status:
            self._status.say(text)
        if network and self._verbose:
            self.note("stage", f"  {text}")

    def fraction(self, network: str, done: float) -> None:
        self.stage("", f"{words_of(network)}: building, {100 * done:.0f} %")

    def bytes_read(self, done: int, total: int) -> None:
        self.stage("", f"hashing weights, once: {done >> 20:,} of {total >> 20:,} MiB")
        if done == total:
            self.note("weights_read", f"hashed {total / 2**20:,.0f} MiB of weights, once")

    def event(self, event: events.Event, **fields: Any) -> None:
        match event:
            case events.PromptTruncated():
                self.note("warning", truncation_in_words(event))
            case events.RunStarted(frames, iterations, first, _):
                self._frames, self._iterations, self._total = frames, iterations, iterations - first
                self._started = time.perf_counter()
            case events.IterationStarted(_, scale, _):
                self._end_status()
                self._scale, self._iteration_started = scale, time.perf_counter()
            case events.MicroBatchHalved():
                self.note("warning", halving_in_words(event))
            case events.IterationFinished(iteration, decoded_again=again):
                self._done += 1
                if again:
                    self.note("warning", decoded_again_in_words(iteration, again))
                text = f"{round_in_words(iteration, self._iterations)}: {count(self._frames, 'frame')} in "
                text += duration(time.perf_counter() - self._iteration_started)
                if left := self._total - self._done:
                    text += f", about {duration((time.perf_counter() - self._started) / self._done * left)} left"
                self.note("iteration", text, detail=f"  {scale_in_words(self._scale)}")

    def close(self) -> None:
        self._end_status()

    def _end_status(self) -> None:
        if self._status:
            self._status.close()
            self._status = None


def truncation_in_words(event: events.PromptTruncated) -> str:
    where = "" if event.frame is None else f"frame {event.frame}: "
    words = event.words
    if len(words) > _WORDS_SHOWN:
        words = f"{words[:_WORDS_SHOWN]}… ({len(words) - _WORDS_SHOWN:,} letters more)"
    return f'{where}the {"negative " * event.negative}prompt is over {TEXT_TOKENS} tokens; cut off: "{words}"'


def halving_in_words(event: events.MicroBatchHalved) -> str:
    which = count(len(event.frames), "frame")
    return f"iteration {event.iteration}: out of memory with {which} at once; going on with {event.max_frames}"


def decoded_again_in_words(iteration: int, frames: Sequence[int]) -> str:
    which = f"frame{'s' * (len(frames) > 1)} {', '.join(map(str, frames))}"
    return f"iteration {iteration}: the VAE gave values that are not finite for {which}, decoded again in fp32"


def round_in_words(iteration: int, iterations: int) -> str:
    """ "round 1 of 4, from text alone"; iterations are counted from 0."""
    return f"round {iteration + 1} of {iterations}" + (", from text alone" if iteration == 0 else "")


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


def words_of(network: str) -> str:
    return network.replace("_", " ")
