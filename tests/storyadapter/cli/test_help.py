"""The first thing a newcomer types."""

import json
import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config

import storyadapter
from storyadapter.__main__ import build_parser, main
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.store import EngineStore
from storyadapter.export import OPSET
from storyadapter.model.numerics import Numerics
from tests.engine.engine_requests import identify, never_waits, ranges
from tests.storyadapter.cli.running import Type

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "rich", "yaml")


@pytest.mark.parametrize("command", [[], ["bench"], ["bench", "throughput"]])
def test_help_is_quick_and_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from storyadapter.__main__ import main\n"
        f"try:\n    main({[*command, '--help']})\n"
        f"finally:\n    print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # the quickest of three: other work on the machine only adds
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "heavy: []" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "command", [[], ["run"], ["serve"], ["build"], ["doctor"], ["engines", "prune"], ["bench", "throughput"]]
)
def test_help_has_examples_that_parse(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: storyadapter-trt")
    examples = [line.split("    ")[0].split() for line in text.splitlines() if line.startswith("  storyadapter-trt ")]
    assert bool(examples) == (command != ["doctor"])
    for _, *words in examples:
        if "--help" not in words:
            build_parser().parse_args([word for word in words if word != "…"])


def test_help_can_be_shown_in_a_terminal_without_lambda() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "storyadapter", "run", "--help"],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"storyadapter-trt {storyadapter.__version__}\n"


def test_no_command(type_in: Type) -> None:
    done = type_in()
    assert done.code == 2
    assert done.err == (
        "storyadapter-trt: error: the following arguments are required: COMMAND; for all options type "
        "storyadapter-trt --help\n"
    )


def test_a_reader_that_goes_away() -> None:
    done = subprocess.run(f"{sys.executable} -m storyadapter doctor | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_standard_output_on_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "storyadapter", "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "storyadapter-trt: error: standard output can't be written: No space left on device\n"
    )


def test_doctor(type_in: Type) -> None:
    done = type_in("doctor")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["machine", "GPU", "versions"]
    backends = [line for line in lines if line.startswith("backend ")]
    assert any(line.startswith("backend    eager: ") and line.endswith("; can serve") for line in backends)
    assert all(line.endswith("; can serve") or "; NO: " in line for line in backends)
    assert any(line.startswith("default    --backend ") for line in lines)
    assert any(line.startswith("engines    0 in ") for line in lines)


def test_doctor_as_json(type_in: Type) -> None:
    done = type_in("doctor", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["schema"] == 1 and found["versions"]["storyadapter-trt"] == storyadapter.__version__
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["eager"]["serves"] and not backends["eager"]["builds"]
    assert all(backend["why_not"] for backend in backends.values() if not backend["serves"])
    assert found["default_backend"] in backends and found["engines"]["count"] == 0
    assert bool(found["gpus"]) == torch.cuda.is_available()


def test_doctor_tells_what_a_build_lacks(type_in: Type, tmp_path: Path) -> None:
    compiler = tmp_path / "g++-that-answers"
    compiler.write_text("#!/bin/sh\necho libstdc++.so\n")
    compiler.chmod(0o755)
    with config.patch({"cpp.cxx": (str(compiler),)}):
        done = type_in("doctor")
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("backend    inductor: "))
    assert "; can run what was built elsewhere, not build: " in line and "finds no shared libstdc++.so" in line


def test_doctor_tells_which_engines_are_outdated(
    type_in: Type, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    asked, details = identify(checkpoint, "onnxruntime", Numerics("fp32")), {"geometry": checkpoint.geometry.as_dict()}
    older = replace(asked, build_options=(("opset", "18"), asked.build_options[1]))
    new, old = (EngineStore().build(e, ranges(), lambda folder: details, never_waits) for e in (asked, older))
    told = type_in("doctor").out
    assert f"engines    2 in {EngineStore().root}\n" in told
    lines = told.splitlines()
    after = lines[next(i for i, line in enumerate(lines) if line.startswith(old.key[:8])) + 1]
    assert after == f"          outdated: opset is 18 in the store, {OPSET} asked for"
    assert lines[-2] == "build again what is still wanted; to remove what is outdated:"
    program, *command = shlex.split(lines[-1])
    assert program == "storyadapter-trt" and type_in(*command).code == 0
    assert EngineStore().scan() == ([new], [])
    assert "outdated" not in type_in("doctor").out
