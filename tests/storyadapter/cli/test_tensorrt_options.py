"""What is typed for TensorRT, and what is told when it doesn't fit."""

import pytest
import torch

from tests.storyadapter.cli.running import Type

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--backend", "eager", "--target", "sm89"], "--target given for backend eager; expected --backend"),
        (
            ["--backend", "onnxruntime", "--workspace", "8", "--optimization-level", "1"],
            "--optimization-level and --workspace given for backend onnxruntime",
        ),
        (["--backend", "tensorrt", "--target", "hopper"], "--target is 'hopper'; expected auto, or "),
        (["--backend", "tensorrt", "--target", "sm89", "--precision", "fp32"], "it can't run in fp32; "),
        (["--backend", "tensorrt", "--target", "sm90"], "backend tensorrt can't serve sm90 here: "),
        (["--backend", "tensorrt", "--target", "sm89", "--optimization-level", "9"], "--optimization-level is 9; "),
        (
            ["--backend", "tensorrt", "--target", "sm89", "--optimization-level", "5"],
            " builds the same at every level: it chooses its kernels when an engine is first run; leave it out",
        ),
        (
            ["--backend", "tensorrt", "--target", "sm89", "--resolution", "512x64"],
            "--resolution 512x64 is outside of --width 64 and --height 64",
        ),
    ],
)
def test_what_cant_be_built_is_one_line(type_in: Type, tiny_model: list[str], words: list[str], told: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("here there is a GPU to build for")
    done = type_in("build", *tiny_model, *words)
    assert done.code == 2
    assert told in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_there_is_no_gpu_to_build_for(type_in: Type, tiny_model: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = type_in("build", *tiny_model, "--backend", "tensorrt")
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith("build needs to know for which one, such as --target sm89")


def test_doctor_tells_which_tensorrt_there_is(type_in: Type) -> None:
    lines = type_in("doctor").out.splitlines()
    assert any(line.startswith("TensorRT   tensorrt-rtx ") for line in lines)
    (backend,) = [line for line in lines if line.startswith("backend    tensorrt: ")]
    assert backend.endswith("; can serve") == torch.cuda.is_available()
