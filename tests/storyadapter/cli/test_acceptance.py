"""`doctor --accept`, with checks of its own: TensorRT's need a GPU that runs its engines."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from storyadapter.engine.acceptance import AcceptancePlan, Check, Outcome, accept, find_acceptance
from storyadapter.engine.backends import BACKENDS
from storyadapter.engine.trial import Trial
from storyadapter.model.contract import Range, ShapeRanges
from tests.engine.own_checks import BREAKS, FAILS, NAMES, PASSES
from tests.storyadapter.cli.running import Type, files

FACTS = {"backend": "tensorrt", "GPU": "NVIDIA RTX 4090", "driver": "580.95", "sources": "0123456789ab"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Make this a machine of `FACTS` on which the backend has these checks."""

    def of(checks: Sequence[Check], left_out: Sequence[tuple[str, str]] = ()) -> None:
        def plan(self: object, folder: Path) -> AcceptancePlan:
            size = Range(64, 64)
            return AcceptancePlan(Trial("eager", folder, "", ShapeRanges(1, 1, size, size)), checks, left_out)  # type: ignore[arg-type]

        kind = type(BACKENDS["tensorrt"])
        monkeypatch.setattr(kind, "acceptance", lambda self: find_acceptance(FACTS))
        monkeypatch.setattr(kind, "acceptance_plan", plan)

    return of


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there may be a GPU that runs it")
def test_a_machine_that_cant_is_told_in_one_line(type_in: Type, folders: Path) -> None:
    for words in ([], ["--json"]):
        done = type_in("doctor", "--accept", "tensorrt", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("storyadapter-trt: error: backend tensorrt can't be accepted here: ")
        assert done.err.count("\n") == 1
    assert files(folders) == {}


def test_a_backend_that_needs_none_is_no_choice(type_in: Type) -> None:
    done = type_in("doctor", "--accept", "eager")
    assert done.code == 2 and "argument --accept: invalid choice: 'eager'" in done.err


def test_a_failed_check_among_others(type_in: Type, machine, folders: Path) -> None:
    machine([PASSES, FAILS, NAMES, BREAKS], [("plugin", "it embeds none")])
    done = type_in("doctor", "--accept", "tensorrt")
    assert done.code == 1
    table, _, text = done.out.partition("\nTo send us, from here to the end:\n\n")
    head, *rows = table.splitlines()
    assert max(map(len, [head, *rows[:4]])) <= 80
    assert head.split() == ["check", "what", "was", "done", "result", "took"]
    assert [(row.split()[0], "FAILED" in row, "passed" in row) for row in rows[:4]] == [
        *(("good", False, True), ("bad", True, False), ("named", True, False), ("broken", True, False))
    ]
    assert rows[4:] == [
        *("plugin: not here, it embeds none", ""),
        "not accepted: 3 of 4 checks failed. --backend auto doesn't choose it.",
    ]
    lines = text.splitlines()
    assert lines[0] == "# Acceptance of tensorrt: 1 of 4 checks passed"
    assert {"- GPU: NVIDIA RTX 4090", "- driver: 580.95", "- not here: plugin, it embeds none"} <= {*lines}
    assert any(line.startswith("- versions: storyadapter-trt ") for line in lines)
    seen = [line.rpartition(" | ")[2] for line in lines[-4:]]
    assert seen[1:] == [
        "two frames were green; expected red ones |",
        "there is no STORE/a\\|b below ~ |",
        "exit code 1: ZeroDivisionError: division by zero |",
    ]
    assert str(folders) not in text and str(Path.home()) not in text
    assert "bad: FAILED, two frames were green" in done.err
    assert files(folders) == {}


def test_what_passed_is_recorded_and_doctor_tells_it(type_in: Type, machine, folders: Path) -> None:
    machine([PASSES])
    assert "accepted   tensorrt: NO; type: storyadapter-trt doctor --accept tensorrt\n" in type_in("doctor").out
    done = type_in("doctor", "--accept", "tensorrt")
    assert done.code == 0
    record = find_acceptance(FACTS).record
    assert record and record.is_relative_to(folders / "data")
    assert [folders / name for name in files(folders)] == [record]
    assert f"\naccepted: --backend auto chooses tensorrt on this machine, as long as there is {record}\n" in done.out
    told = type_in("doctor").out
    assert f"accepted   tensorrt: on this machine, by {record}\n" in told
    assert "default    --backend tensorrt\n" in told
    record.unlink()
    assert "default    --backend tensorrt\n" not in type_in("doctor").out


def test_as_json(type_in: Type, machine) -> None:
    machine([PASSES], [("fp8", "too old")])
    done = type_in("doctor", "--accept", "tensorrt", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert (found["schema"], found["accepted"], found["facts"]) == (1, True, FACTS)
    assert Path(found["record"]).is_file() and found["not_here"] == [{"name": "fp8", "why": "too old"}]
    (check,) = found["checks"]
    assert (check["name"], check["what"], check["passed"]) == ("good", "nothing", True)
    backends = {backend["name"]: backend for backend in json.loads(type_in("doctor", "--json").out)["backends"]}
    assert backends["tensorrt"]["acceptance"] == {"record": found["record"], "differences": []}
    assert backends["eager"]["acceptance"] is None


def test_a_record_of_another_driver_is_told(type_in: Type, machine) -> None:
    accept({**FACTS, "driver": "570.1"}, [Outcome(PASSES, True, "fine", 1.0)])
    machine([PASSES])
    lines = type_in("doctor").out.splitlines()
    told = "accepted   tensorrt: NO, though elsewhere: driver is 580.95 here, 570.1 there; type: "
    assert f"{told}storyadapter-trt doctor --accept tensorrt" in lines
    assert "default    --backend tensorrt" not in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="here TensorRT may run")
def test_auto_takes_another_for_a_precision_that_the_accepted_has_not(
    type_in: Type, machine, quick_run: list[str]
) -> None:
    accept(FACTS, [Outcome(PASSES, True, "fine", 1.0)])
    machine([PASSES])
    words = [*quick_run, "--backend", "auto", "--engine-dir", "engines"]
    for precision in ("fp16", "bf16"):
        assert "error: backend tensorrt " in type_in(*words, "--precision", precision).err  # it takes a GPU
    done = type_in(*words, "--precision", "fp32")
    assert done.code == 2 and "build it: storyadapter-trt build " in done.err
    assert " --backend onnxruntime --precision fp32 " in done.err
    done = type_in(*words, "--backend", "tensorrt", "--precision", "fp32")
    assert done.code == 2 and "error: backend tensorrt " in done.err
