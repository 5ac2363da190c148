"""`--device`: what a command sees of a machine's GPUs."""

import os

import pytest

from storyadapter.__main__ import main
from storyadapter.cli.devices import _visible, only_device
from storyadapter.method.errors import UnavailableError
from tests.refusals import raises_typed
from tests.storyadapter.cli.running import Type


@pytest.mark.parametrize(
    ("index", "before", "visible"),
    [(0, None, "0"), (3, None, "3"), (1, "4,7", "7"), (2, "4,7", ""), (0, "GPU-5ebe9", "GPU-5ebe9"), (0, "", "")],
)
def test_gpus_are_counted_as_they_are_visible(index: int, before: str | None, visible: str) -> None:
    assert _visible(index, before) == visible


@pytest.mark.parametrize("before", [None, "2,3"])
def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with only_device("cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    with only_device(None):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_gpu_that_is_not_there(type_in: Type, quick_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with raises_typed(UnavailableError, r"^--device is cuda:9: there is no such GPU here"), only_device("cuda:9"):
        pass
    done = type_in(*quick_run, "--device", "cuda:9")
    assert done.code == 2 and done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "1"])
def test_what_is_no_device(name: str, type_in: Type) -> None:
    done = type_in("run", "--device", name)
    assert (done.code, done.out) == (2, "")
    assert f"--device: {name!r} is not a device such as cuda:1 or cpu" in done.err


def test_the_cpu(quick_run: list[str]) -> None:
    assert main([*quick_run, "--iterations", "0", "--device", "cpu", "--quiet"]) == 0
