"""A run that is killed at random moments and resumed each time, or whose workers are: its pictures must be those of one
that never stopped, and no more may be drawn again than was under way."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import SIGKILL
from typing import IO, Final

import psutil

from storyadapter.method.errors import RunError

BATCHES_UNDER_WAY: Final = 2


@dataclass(frozen=True)
class Process:
    """A run in a process of its own: the lines of its `--json-log`, and what ends it; `wait` gives its exit code."""

    log: IO[str]
    kill: Callable[[], object]
    wait: Callable[[], int | None]
    number: int


@dataclass(frozen=True)
class KilledRun:
    """What became of it."""

    kills: int  # that were asked for, of the run or of its workers
    killed: int  # of these, those that came before the end
    frames: int  # of the story, in all its iterations
    redrawn: int  # how many more were begun, so that something of them was lost
    allowed: int  # how many may be: those of the batches under way at every kill
    different: Sequence[str]  # names of the pictures that aren't those of the uninterrupted run

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words."""
        found = []
        if self.killed < self.kills:
            found.append(f"only {self.killed} of {self.kills} kills came before the end")
        if self.different:
            found.append(f"{len(self.different)} pictures of the resumed run differ, {self.different[0]} among them")
        if self.redrawn > self.allowed:
            found.append(f"{self.redrawn} frames were drawn again after {self.kills} kills; allowed are {self.allowed}")
        return found


@dataclass
class _Progress:
    """What the processes have told so far."""

    events: int = 0
    began: float = 0  # to draw, by `time.monotonic`
    begun: int = 0
    kept: set[tuple[int, int]] = field(default_factory=set)


def start_program(words: Sequence[str]) -> Process:
    """The installed program."""
    process = subprocess.Popen([sys.executable, "-m", "storyadapter", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return Process(process.stdout, process.kill, process.wait, process.pid)


def kill_and_resume(
    words: Sequence[str],
    folder: Path,
    *,
    kills: int,
    max_frames: int,
    seed: int = 0,
    start: Callable[[Sequence[str]], Process] = start_program,
) -> KilledRun:
    """Draw a story without a stop, then again with `kills` stops by SIGKILL, spread over the whole run.

    Args:
        words: of a `run`, all but where it writes.
        folder: gets both runs.
        max_frames: of a batch.
        seed: of the moments.
        start: begins the program with these words.

    Raises:
        RunError: a run fails; it has told why on standard error.
    """
    random, whole, told = Random(seed), _Progress(), _Progress()
    _follow(start(_uninterrupted(words, folder)), whole)
    pause = (time.monotonic() - whole.began) / whole.events
    command = [*words, "--json-log", "--out", str(folder / "killed")]
    killed = 0
    for left in range(kills, 0, -1):
        ahead = whole.events * (1 - len(told.kept) / len(whole.kept))
        moment = random.randint(1, max(1, int(1.6 * ahead / (left + 1))))
        killed += _kill_at(start(command), told, moment, random.uniform(0, pause))
        command = [*words, "--json-log", "--out", str(folder / "killed"), "--resume"]
    _follow(start(command), told)
    return _killed_run(folder, kills, killed, whole, told, max_frames)


def kill_workers(
    words: Sequence[str],
    folder: Path,
    *,
    kills: int,
    max_frames: int,
    seed: int = 0,
    start: Callable[[Sequence[str]], Process] = start_program,
) -> KilledRun:
    """Draw a story without a stop, then again with `kills` of its workers ended by SIGKILL at random moments; see
    `kill_and_resume`."""
    random, whole, told = Random(seed), _Progress(), _Progress()
    _follow(start(_uninterrupted(words, folder)), whole)
    moments = set(random.sample(range(1, whole.events), kills))
    process, killed = start([*words, "--json-log", "--out", str(folder / "killed")]), 0

    def kill_one(events: int) -> None:
        nonlocal killed
        if events in moments:
            while not (workers := actors_of(process.number)):
                time.sleep(0.1)  # all are begun again
            random.choice(workers).kill()
            killed += 1

    _follow(process, told, kill_one)
    return _killed_run(folder, kills, killed, whole, told, max_frames)


def actors_of(number: int) -> list[psutil.Process]:
    """Ray actors below a process."""
    found = []
    for child in psutil.Process(number).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::Actor" in " ".join(child.cmdline()):
                found.append(child)
    return found


def _uninterrupted(words: Sequence[str], folder: Path) -> list[str]:
    return [*words, "--json-log", "--out", str(folder / "uninterrupted")]


def _killed_run(folder: Path, kills: int, killed: int, whole: _Progress, told: _Progress, max_frames: int) -> KilledRun:
    expected, found = (_pictures(folder / name) for name in ("uninterrupted", "killed"))
    different = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
    redrawn, allowed = told.begun - whole.begun, kills * BATCHES_UNDER_WAY * max_frames
    return KilledRun(kills, killed, whole.begun, redrawn, allowed, different)


def _kill_at(process: Process, told: _Progress, moment: int, pause: float) -> bool:
    """Kill a run so many events after it began to draw, and a little; whether it hadn't ended before."""

    def kill(events: int) -> None:
        if events == moment:
            time.sleep(pause)
            process.kill()

    return _follow(process, told, kill) == -SIGKILL


def _follow(process: Process, told: _Progress, at: Callable[[int], None] = lambda events: None) -> int | None:
    """Read a run's log to its end; `at` is called with the number of events since it began to draw. Returns the exit
    code."""
    events = 0
    with process.log as lines:
        for line in lines:
            if not line.endswith("\n"):  # it was killed in the middle of it
                continue
            match json.loads(line):
                case {"event": "step_finished", "step": 1, "frames": frames}:
                    told.begun += len(frames)
                case {"event": "frame_finished", "iteration": iteration, "frame": frame}:
                    told.kept.add((iteration, frame))
                case {"event": "run_started"}:
                    told.began, events = time.monotonic(), 1
                case _ if not events:
                    continue
            events += 1
            at(events - 1)
    told.events += events
    code = process.wait()
    if code not in (0, -SIGKILL):
        raise RunError(f"a run that was to be killed ended with exit code {code}")
    return code


def _pictures(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.suffix in (".png", ".gif")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
