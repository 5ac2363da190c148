"""What the commands that choose tiles have in common."""

import pytest
import torch

from storyadapter.bench.tuning import compile_all, exit_code, find_gpu, refusal
from storyadapter.method.errors import RunError, UnavailableError


def test_candidates_keep_their_order() -> None:
    assert compile_all(abs, [-3, 1, -2]) == [3, 1, 2]


def test_a_refusal_is_one_line() -> None:
    assert refusal(RuntimeError("out of resource: shared memory\nand much more")) == "out of resource: shared memory"
    assert refusal(RuntimeError("x" * 1000)) == "x" * 200
    assert refusal(AssertionError()) == "AssertionError"


def test_errors_end_a_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise RunError("no space left")

    assert exit_code(stop) == 1
    assert capsys.readouterr().err == "error: no space left\n"
    assert exit_code(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        exit_code(lambda: 1 // 0)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install triton"):
        find_gpu()
