"""What becomes of Ctrl-C and SIGTERM where they come within a library."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storyadapter.cli.interrupts import INTERRUPTED, Terminated, exit_code_of, interrupts_kept, sigterm_as_interrupt


@pytest.fixture
def _usual_ctrl_c() -> Iterator[None]:
    """A shell that starts something in the background lets it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_usual_ctrl_c")
@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_error_that_a_library_makes_of_an_interrupt_is_that_interrupt(number: int, stop: type) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as raised, sigterm_as_interrupt(), interrupts_kept():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert type(raised.value) is stop and isinstance(raised.value.__cause__, ValueError)
    assert exit_code_of(raised.value) == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_other_errors_are_what_they_are() -> None:
    with pytest.raises(ValueError, match="^a real one$"), interrupts_kept():
        raise ValueError("a real one")


STOPPED_WITHIN_AN_EXEC = """
import argparse, sys
from storyadapter.cli.main import Parser, run_program
parser = Parser()
parser.set_defaults(run=lambda args: exec("raise KeyboardInterrupt"))
sys.exit(run_program(parser, []))
"""


def test_the_exit_code_is_told_wherever_ctrl_c_came(tmp_path: Path) -> None:
    """Python would end such a program, started by `-m`, by the signal itself."""
    (tmp_path / "stopped.py").write_text(STOPPED_WITHIN_AN_EXEC)
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "storyadapter-trt: stopped\n")
