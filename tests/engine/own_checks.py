"""Checks of no backend, for whoever runs checks: each ends in another way."""

import os
import time
from pathlib import Path

from storyadapter.engine.acceptance import Check
from storyadapter.engine.trial import Trial, TrialError


def passes(trial: Trial) -> str:
    return f"process {os.getpid()} with {trial.number_format}"


def fails(trial: Trial) -> str:
    raise TrialError("two frames\nwere green", expected="red ones")


def names_folders(trial: Trial) -> str:
    raise TrialError(f"there is no {trial.folder}/a|b below {Path.home()}")


def breaks(trial: Trial) -> str:
    return str(1 / 0)


def crashes(trial: Trial) -> str:
    os.abort()


def hangs(trial: Trial) -> str:
    time.sleep(600)
    return "late"


PASSES = Check("good", "nothing", passes)
QUANTIZED = Check("good fp8", "nothing in fp8", passes, "fp8")
FAILS = Check("bad", "look at frames", fails)
NAMES = Check("named", "look at folders", names_folders)
BREAKS = Check("broken", "divide by zero", breaks)
CRASHES = Check("crashing", "abort", crashes)
HANGS = Check("hanging", "sleep", hangs)
