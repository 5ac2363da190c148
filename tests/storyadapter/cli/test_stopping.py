"""A run that is stopped at any moment goes on as if it had not been."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.__main__ import main
from storyadapter.bench.kills import Process, kill_and_resume
from storyadapter.cli.interrupts import INTERRUPTED, TERMINATED
from tests.small_disk import run_on_small_disk
from tests.storyadapter.cli.running import Done, Type, pictures, program

HINT = "type the same command with --resume to go on"


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """A server that has imported everything, and forks a process per run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.storyadapter.cli.running", "storyadapter.cli.drawing", "storyadapter.engine.eager"]
    )
    return context


@pytest.fixture
def stopped(processes: multiprocessing.context.ForkServerContext, tmp_path: Path):
    """Begin a run with `--json-log`, and do something to it when an iteration is finished."""

    def call(words: list[str], iteration: int, act: Callable[[BaseProcess], None]) -> Done:
        out, err = tmp_path / "log", tmp_path / "err"
        for path in (out, err):
            path.unlink(missing_ok=True)
        os.mkfifo(out)
        process = processes.Process(target=program, args=([*words, "--json-log"], out, err))
        process.start()
        lines, acted = [], False
        try:
            with out.open() as log:
                for line in log:
                    lines.append(line)
                    if line.startswith(f'{{"event": "iteration_finished", "iteration": {iteration},'):
                        act(process)
                        acted = True
            process.join(60)
        finally:
            process.kill()
        assert acted, err.read_text()
        return Done(process.exitcode, "".join(lines), err.read_text())

    return call


def send(number: int) -> Callable[[BaseProcess], None]:
    return lambda process: os.kill(process.pid, number)


def finished_iterations(out: str = "out") -> int:
    """Checks that every file of a run opens, too."""
    for path in Path(out).rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    return len(json.loads(Path(out, "story.json").read_text())["progress"]["iterations"])


@pytest.fixture
def long_run(quick_run: list[str]) -> list[str]:
    """Long enough to be stopped in the middle of an iteration."""
    return [*quick_run, "--steps", "6", "--iterations", "6"]


def test_stopped_in_every_way_and_resumed_it_draws_the_same(
    type_in: Type, stopped, long_run: list[str], tmp_path: Path
) -> None:
    assert type_in(*long_run, "--out", "uninterrupted").code == 0

    done = stopped(long_run, 0, send(signal.SIGKILL))
    assert done.code == -signal.SIGKILL
    assert 1 <= (first := finished_iterations()) < 7

    done = stopped([*long_run, "--resume"], first, send(signal.SIGINT))
    assert done.code == INTERRUPTED == 130
    second = finished_iterations()
    assert first < second < 7
    assert done.err == f"storyadapter-trt: stopped; {second} of 7 iterations finished; {HINT}\n"

    def no_space(process: BaseProcess) -> None:  # from here on, no file may be as large as a frame
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))

    done = stopped([*long_run, "--resume"], second, no_space)
    assert done.code == 1
    third = finished_iterations()
    assert second < third < 7
    assert done.err.startswith("storyadapter-trt: error: out/")
    assert done.err.endswith(": the file size limit is reached; make room, then go on with --resume\n")
    assert done.err.count("\n") == 1
    assert not list(Path("out").rglob("*.part"))

    done = stopped([*long_run, "--resume"], third, send(signal.SIGTERM))
    assert done.code == TERMINATED == 143
    assert done.err == f"storyadapter-trt: stopped; {finished_iterations()} of 7 iterations finished; {HINT}\n"

    done = type_in(*long_run)
    assert done.code == 2 and "type --resume to go on with it" in done.err
    assert type_in(*long_run, "--resume").code == 0
    assert pictures(Path("out")) == pictures(Path("uninterrupted"))


def test_killed_at_random_moments_and_resumed(
    processes: multiprocessing.context.ForkServerContext, quick_run: list[str], tmp_path: Path
) -> None:
    """The pictures are the same byte by byte, and no more is drawn again than was under way."""
    numbers = count()

    def start(words: Sequence[str]) -> Process:
        out, err = tmp_path / f"log-{next(numbers)}", tmp_path / "err"
        os.mkfifo(out)
        process = processes.Process(target=program, args=(list(words), out, err))
        process.start()

        def wait() -> int | None:
            process.join(60)
            return process.exitcode

        return Process(out.open(), process.kill, wait, process.pid)

    words = [*quick_run[: quick_run.index("--out")], *("--prompt", *(f"a tree {number}" for number in range(9)))]
    words += ["--max-frames", "2"]
    found = kill_and_resume(words, tmp_path, kills=3, max_frames=2, seed=4, start=start)
    assert (found.kills, found.killed, found.frames, found.allowed) == (3, 3, 36, 12)
    assert found.problems == []


def test_two_runs_into_one_folder(type_in: Type, stopped, long_run: list[str]) -> None:
    def second_run(process: BaseProcess) -> None:
        done = type_in(*long_run, "--resume")
        assert process.is_alive()
        assert done.code == 2
        assert "storyadapter-trt: error: out is in use by another run; wait until that has ended, or " in done.err
        process.terminate()

    assert stopped(long_run, 0, second_run).code == TERMINATED


def hear_ctrl_c() -> None:
    """A shell's background job is started deaf to Ctrl-C, and so are its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_loading(quick_run: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "storyadapter", *quick_run, "--json-log"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_ctrl_c) as process:
        while not (event := json.loads(process.stdout.readline())).get("network") and event["event"] != "weights_read":
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    last = json.loads(out.splitlines()[-1])
    assert (last["event"], last["exit_code"], last["text"]) == ("stopped", INTERRUPTED, "stopped")
    assert err == "storyadapter-trt: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(quick_run: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "storyadapter", *quick_run, "--out", disk / "out"]
    done = run_on_small_disk(144, command, disk, "out", Path("kept"))
    assert done.returncode == 1
    assert "no space left on the disk; make room, then go on with --resume" in done.stderr.splitlines()[-1]
    assert 1 <= finished_iterations("kept") < 3
    assert main([*quick_run, "--out", "kept", "--resume"]) == 0
    assert finished_iterations("kept") == 3


@pytest.mark.parametrize("mib", [300, 900])
def test_a_limit_below_what_pytorch_takes(quick_run: list[str], mib: int) -> None:
    """It would end the process, or hang it, within libraries that can't say so."""
    words = ["sh", "-c", f'ulimit -v {mib << 10}; exec "$@"', "sh", sys.executable, "-m", "storyadapter", *quick_run]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"storyadapter-trt: error: this process may use {mib} MiB of memory (ulimit -v); expected 1,536 MiB or more, "
        "which PyTorch alone takes\n",
    )


SHORT_OF_MEMORY = """
import resource, sys
import psutil
from storyadapter.__main__ import main
from storyadapter.bench.kills import Process, kill_and_resume
small, large = (sys.argv[1:-2] + ["--quiet", "--out", name] for name in ("small", "large"))
assert main(small) == 0  # so that all that a run imports is there
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (300 << 20), most))
sys.exit(main(large + ["--height", sys.argv[-2], "--width", sys.argv[-1]]))
"""


def test_no_memory_is_left(quick_run: list[str]) -> None:
    # a fresh process: one that did much before keeps memory that no limit takes away
    words = [sys.executable, "-c", SHORT_OF_MEMORY, *quick_run, "4096", "4096"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "storyadapter-trt: error: out of memory with --max-frames 8 and frames of 4096x4096; type a smaller "
        "--max-frames, and --resume to keep what is finished\n"
    )
