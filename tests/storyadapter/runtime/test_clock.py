"""Clock and marks on a CPU, where work is done when it has been called; `tests/gpu` has the GPU's."""

import time

import pytest
import torch

from storyadapter.runtime.clock import DeviceMarks, StageClock

CPU = torch.device("cpu")


def test_stages_add_up_and_what_lies_between_them_does_not_count() -> None:
    clock = StageClock(CPU)
    for name in ("one", "other", "one"):
        with clock.stage(name):
            time.sleep(0.01)
        time.sleep(0.05)
    seconds = clock.seconds()
    assert list(seconds) == ["one", "other"]
    assert 0.02 <= seconds["one"] < 0.07 and 0.01 <= seconds["other"] < 0.06
    assert clock.seconds() == seconds


def test_a_stage_that_failed_does_not_count() -> None:
    clock = StageClock(CPU)
    with pytest.raises(ValueError), clock.stage("one"):
        raise ValueError
    assert clock.seconds() == {}


def test_marks_are_told_once_and_in_order() -> None:
    marks: DeviceMarks[int] = DeviceMarks(CPU)
    for number in (3, 1, 2):
        marks.put(number)
    assert len(marks) == 3
    assert list(marks.passed()) == [3, 1, 2]
    assert len(marks) == 0 and list(marks.passed()) == []
