"""Acceptance of a backend on one machine: checks that run one by one, and the record that lets `auto` choose it.

Each check has a process of its own, so that one that fails, crashes or hangs, and whatever it leaves on a GPU, hides no
other. Imports nothing heavy until it is asked.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storyadapter.engine.processes import EndedEarly, Processes
from storyadapter.method.errors import RunError, StoryAdapterError
from storyadapter.model.numerics import NumberFormat
from storyadapter.output.files import write_atomically

if TYPE_CHECKING:
    from storyadapter.engine.trial import Trial

_SECONDS_AT_MOST: Final = 1800.0  # of one check
_VERSION: Final = 1  # of a record

Facts = Mapping[str, str]  # what an acceptance depends on, by name: "GPU", "driver", …; "backend" among them


@dataclass(frozen=True)
class Check:
    """One thing that a backend must do.

    Attributes:
        name, what: for people; what is done.
        run: a function of a module; gives what was seen, raises where that isn't right.
        number_format: of the engine that it is made with; None for half precision.
    """

    name: str
    what: str
    run: "Callable[[Trial], str]"
    number_format: NumberFormat | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a check: `said` is what was seen, or why it failed."""

    check: Check
    passed: bool
    said: str
    seconds: float


@dataclass(frozen=True)
class AcceptancePlan:
    """How a backend is accepted on one machine.

    Attributes:
        trial: what its checks are made with.
        checks: all of which must pass.
        left_out: what this machine can't show: name and why.
    """

    trial: "Trial"
    checks: Sequence[Check]
    left_out: Sequence[tuple[str, str]] = ()


def run_checks(
    checks: Sequence[Check],
    trial: "Trial",
    on_begin: Callable[[Check], object] = lambda check: None,
    on_end: Callable[[Outcome], object] = lambda outcome: None,
    *,
    seconds_at_most: float = _SECONDS_AT_MOST,
) -> list[Outcome]:
    """Run all checks, one after the other, whatever becomes of those before.

    Args:
        seconds_at_most: after which a check is ended, and has failed.
    """
    outcomes = []
    for check in checks:
        on_begin(check)
        started = time.perf_counter()
        passed, said = _run_alone(check, replace(trial, number_format=check.number_format), seconds_at_most)
        outcomes.append(Outcome(check, passed, said, time.perf_counter() - started))
        on_end(outcomes[-1])
    return outcomes


def _run_alone(check: Check, trial: "Trial", seconds_at_most: float) -> tuple[bool, str]:
    late = threading.Event()
    with Processes() as processes:

        def end() -> None:
            late.set()
            processes.stop()

        timer = threading.Timer(seconds_at_most, end)
        timer.start()
        try:
            return True, processes.run(_call, (check.run, trial), lambda told: None)
        except (StoryAdapterError, OSError) as error:
            return False, " ".join(str(error).split())
        except EndedEarly as ended:
            return False, f"it didn't end within {seconds_at_most:g} s" if late.is_set() else str(ended)
        finally:
            timer.cancel()


def _call(request: "tuple[Callable[[Trial], str], Trial]", tell: Callable[..., None]) -> str:
    run, trial = request
    return run(trial)


@dataclass(frozen=True)
class Acceptance:
    """Whether a backend was accepted on this machine.

    Attributes:
        facts: those of this machine and this version of the program.
        record: the file that says so; None where it wasn't accepted.
        differences: of the nearest record of other facts: fact, there, here; empty where there is none.
    """

    facts: Facts
    record: Path | None
    differences: Sequence[tuple[str, str, str]] = ()


def find_acceptance(facts: Facts) -> Acceptance:
    """What the user's data folder says of a backend; a record that can't be read counts for nothing."""
    if _read(path := _path(facts)) == facts:
        return Acceptance(facts, path)
    others = [other for path in sorted(path.parent.glob(f"{facts['backend']}-*.json")) if (other := _read(path))]
    different = [
        [(name, other.get(name, "not told"), value) for name, value in facts.items() if other.get(name) != value]
        for other in others
    ]
    return Acceptance(facts, None, min(different, key=len, default=()))


def accept(facts: Facts, outcomes: Sequence[Outcome]) -> Path:
    """Write the record of a backend all of whose checks passed; gives its file.

    Raises:
        ValueError: one of them failed, or there are none.
        RunError: it can't be written.
    """
    if not outcomes or not all(outcome.passed for outcome in outcomes):
        raise ValueError("a backend is accepted when all of its checks have passed")
    path = _path(facts)
    record = {
        "version": _VERSION,
        "facts": dict(facts),
        "checks": [outcome.check.name for outcome in outcomes],
        "accepted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent} can't be made: {error.strerror}") from error
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


def _path(facts: Facts) -> Path:
    from platformdirs import user_data_path

    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
    return user_data_path("storyadapter-trt", appauthor=False) / "accepted" / f"{facts['backend']}-{digest}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """The facts in a record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(record["facts"]) if record["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
