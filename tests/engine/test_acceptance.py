"""Checks that run alone, records of those that passed, and what `auto` makes of the records."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from storyadapter.checkpoint import CheckpointPaths
from storyadapter.engine.acceptance import Outcome, accept, find_acceptance, run_checks
from storyadapter.engine.backends import AUTO, BACKENDS, find_backend
from storyadapter.engine.trial import Trial
from storyadapter.method.errors import RunError, UnavailableError
from storyadapter.model.contract import Range, ShapeRanges
from tests.engine.own_checks import BREAKS, CRASHES, FAILS, HANGS, PASSES, QUANTIZED

ROOT = Path(__file__).parents[2]
FACTS = {"backend": "tensorrt", "GPU": "NVIDIA RTX 4090", "driver": "580.95", "sources": "0123456789ab"}
PASSED = [Outcome(PASSES, True, "fine", 1.5)]


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the checks' processes find the tests' own
    return tmp_path / "data"


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    size = Range(64, 64)
    return Trial("eager", tmp_path, CheckpointPaths.given(None, None, None), ShapeRanges(2, 4, size, size))


def test_each_check_runs_alone_whatever_becomes_of_the_others(trial: Trial) -> None:
    told: list[object] = []
    checks = [BREAKS, CRASHES, FAILS, PASSES, QUANTIZED]
    outcomes = run_checks(checks, trial, told.append, told.append)
    assert told == [item for pair in zip(checks, outcomes, strict=True) for item in pair]
    assert [outcome.passed for outcome in outcomes] == [False, False, False, True, True]
    said = [outcome.said for outcome in outcomes]
    assert said[0] == "exit code 1: ZeroDivisionError: division by zero"
    assert said[1].startswith("exit code -6: ")
    assert said[2] == "two frames were green; expected red ones"
    numbers = [int(re.fullmatch(r"process (\d+) with (?:None|fp8)", text)[1]) for text in said[3:]]  # type: ignore[index]
    assert said[4].endswith(" with fp8") and len({*numbers, os.getpid()}) == 3


def test_a_check_that_hangs_has_failed(trial: Trial) -> None:
    (outcome,) = run_checks([HANGS], trial, seconds_at_most=2)
    assert (outcome.passed, outcome.said) == (False, "it didn't end within 2 s")
    assert 2 <= outcome.seconds < 60


def test_a_record_counts_for_its_own_facts_alone() -> None:
    assert find_acceptance(FACTS).record is None
    path = accept(FACTS, PASSED)
    assert find_acceptance(FACTS).record == path
    assert json.loads(path.read_text())["checks"] == ["good"]
    for name in FACTS.keys() - {"backend"}:
        other = find_acceptance({**FACTS, name: "another"})
        assert (other.record, other.differences) == (None, [(name, FACTS[name], "another")])
    assert find_acceptance({**FACTS, "backend": "other"}).differences == ()
    more = find_acceptance({**FACTS, "PyTorch": "2.13"})
    assert (more.record, more.differences) == (None, [("PyTorch", "not told", "2.13")])


def test_of_several_records_the_nearest_is_told() -> None:
    accept({**FACTS, "GPU": "A", "driver": "B"}, PASSED)
    accept({**FACTS, "driver": "C"}, PASSED)
    assert find_acceptance(FACTS).differences == [("driver", "C", FACTS["driver"])]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "facts": 3}', "\x80"])
def test_a_damaged_record_counts_for_nothing(text: str) -> None:
    path = accept(FACTS, PASSED)
    path.write_text(text, encoding="latin-1")
    found = find_acceptance(FACTS)
    assert (found.record, found.differences) == (None, ())
    assert find_acceptance(FACTS | {"driver": "C"}).differences == ()


def test_a_record_under_another_records_name_counts_for_nothing() -> None:
    path = accept(FACTS, PASSED)
    other = accept({**FACTS, "driver": "C"}, PASSED)
    path.write_bytes(other.read_bytes())
    assert find_acceptance(FACTS).record is None


@pytest.mark.parametrize("outcomes", [[], [*PASSED, Outcome(FAILS, False, "green", 1.0)]])
def test_what_failed_is_never_recorded(outcomes: list[Outcome], data_folder: Path) -> None:
    with pytest.raises(ValueError, match="^a backend is accepted when all of its checks have passed$"):
        accept(FACTS, outcomes)
    assert not data_folder.exists()


def test_a_data_folder_that_cant_be_made_is_one_line(data_folder: Path) -> None:
    data_folder.write_text("a file")
    with pytest.raises(RunError, match=r"/accepted can't be made: Not a directory$"):
        accept(FACTS, PASSED)


@pytest.fixture
def on_a_machine_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The facts of a machine on which TensorRT runs; those of this one aren't asked for."""
    facts = dict(FACTS)
    monkeypatch.setattr(type(BACKENDS["tensorrt"]), "acceptance", lambda self: find_acceptance(facts))
    yield facts


def test_auto_takes_what_was_accepted_on_this_machine_alone(on_a_machine_of: dict[str, str]) -> None:
    usual = find_backend(AUTO)
    assert usual.name != "tensorrt"
    path = accept(FACTS, PASSED)
    assert find_backend(AUTO).name == "tensorrt"
    assert {find_backend(AUTO, precision=name).name for name in ("fp16", "bf16", "fp8")} == {"tensorrt"}
    assert find_backend(AUTO, precision="fp32") is usual  # which TensorRT doesn't have
    assert find_backend("tensorrt", precision="fp32").name == "tensorrt"
    on_a_machine_of["driver"] = "590.1"
    assert find_backend(AUTO) is usual
    on_a_machine_of |= FACTS
    path.unlink()
    assert find_backend(AUTO) is usual


def test_what_needs_no_acceptance_has_no_plan(tmp_path: Path) -> None:
    for name, backend in BACKENDS.items():
        if not backend.accepted_first:
            assert backend.acceptance() is None
            with pytest.raises(UnavailableError, match=f"^backend {name} needs no acceptance$"):
                backend.acceptance_plan(tmp_path)
