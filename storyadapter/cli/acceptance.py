"""`doctor --accept`: a backend that the developers could not run is tried on this machine; and the words for it."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from storyadapter.cli.machine import versions
from storyadapter.cli.printing import json_line, one_line, print_result, tell
from storyadapter.cli.reporting import count, duration
from storyadapter.cli.status import Status
from storyadapter.engine.acceptance import AcceptancePlan, Check, Facts, Outcome, accept, run_checks
from storyadapter.engine.backend import Backend
from storyadapter.engine.backends import AUTO, find_backend

_ROW: Final = "{:<13}  {:<38}  {:<8}  {:>13}"
_RESULT: Final = {True: "passed", False: "FAILED"}


def accept_backend(args: argparse.Namespace) -> int:
    """Try a backend on this machine, tell what was seen, and let `auto` choose it if all is right.

    Returns:
        The exit code: 1 if a check failed; nothing is recorded then.

    Raises:
        UnavailableError: it can't be tried here; the text says what is missing.
        RunError: the record can't be written.
    """
    backend = find_backend(args.accept)
    with tempfile.TemporaryDirectory(prefix="storyadapter-accept-") as folder:
        plan = backend.acceptance_plan(Path(folder))
        found = backend.acceptance()
        assert found is not None  # or there were no plan
        outcomes = _told(plan, folder)
    return finish(backend, found.facts, plan, outcomes, as_json=args.json)


def finish(backend: Backend, facts: Facts, plan: AcceptancePlan, outcomes: Sequence[Outcome], *, as_json: bool) -> int:
    """Record what passed and print all of it; see `accept_backend`."""
    passed = all(outcome.passed for outcome in outcomes)
    record = accept(facts, outcomes) if passed else None
    if as_json:
        print_result(json_line(as_data(facts, plan, outcomes, record)))
    else:
        lines = [*table(plan, outcomes), "", *verdict(backend, outcomes, record), ""]
        print_result("\n".join([*lines, "To send us, from here to the end:", "", *report(facts, plan, outcomes)]))
    return 0 if passed else 1


def _told(plan: AcceptancePlan, folder: str) -> list[Outcome]:
    """Run the checks, telling each on standard error; what they say names no folder of this machine."""
    status = Status("starting", in_place=sys.stderr.isatty())
    outcomes: list[Outcome] = []

    def on_begin(check: Check) -> None:
        status.say(f"check {len(outcomes) + 1} of {len(plan.checks)}, {check.name}: {check.what}")

    def on_end(outcome: Outcome) -> None:
        said = outcome.said.replace(folder, "STORE").replace(str(Path.home()), "~")
        outcomes.append(Outcome(outcome.check, outcome.passed, said, outcome.seconds))
        status.clear()
        tell(f"{outcome.check.name}: {_RESULT[outcome.passed]}, {said}")

    try:
        run_checks(plan.checks, plan.trial, on_begin, on_end)
    finally:
        status.close()
    return outcomes


def table(plan: AcceptancePlan, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A row per check, 80 columns wide."""
    yield _ROW.format("check", "what was done", "result", "took")
    for outcome in outcomes:
        check = outcome.check
        yield _ROW.format(check.name, check.what, _RESULT[outcome.passed], duration(outcome.seconds))
    for name, why in plan.left_out:
        yield f"{name}: not here, {why}"


def verdict(backend: Backend, outcomes: Sequence[Outcome], record: Path | None) -> Iterator[str]:
    """What follows from it."""
    if record is None:
        failed = sum(not outcome.passed for outcome in outcomes)
        yield f"not accepted: {failed} of {count(len(outcomes), 'check')} failed. --backend {AUTO} doesn't choose it."
    else:
        yield f"accepted: --backend {AUTO} chooses {backend.name} on this machine, as long as there is {record}"


def report(facts: Facts, plan: AcceptancePlan, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The text to send, in Markdown: names no file, user or host."""
    passed = sum(outcome.passed for outcome in outcomes)
    yield f"# Acceptance of {facts['backend']}: {passed} of {count(len(outcomes), 'check')} passed"
    yield ""
    yield from (f"- {name}: {value}" for name, value in facts.items() if name != "backend")
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in versions().items())}"
    yield from (f"- not here: {name}, {why}" for name, why in plan.left_out)
    yield ""
    yield "| check | result | seconds | seen |"
    yield "| --- | --- | --- | --- |"
    for outcome in outcomes:
        seen = one_line(outcome.said).replace("|", "\\|")
        yield f"| {outcome.check.name} | {_RESULT[outcome.passed]} | {outcome.seconds:.1f} | {seen} |"


def as_data(facts: Facts, plan: AcceptancePlan, outcomes: Sequence[Outcome], record: Path | None) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "schema": 1,
        "facts": dict(facts),
        "versions": versions(),
        "checks": [
            {
                "name": outcome.check.name,
                "what": outcome.check.what,
                "passed": outcome.passed,
                "seconds": round(outcome.seconds, 1),
                "seen": outcome.said,
            }
            for outcome in outcomes
        ],
        "not_here": [{"name": name, "why": why} for name, why in plan.left_out],
        "accepted": record is not None,
        "record": None if record is None else str(record),
    }
