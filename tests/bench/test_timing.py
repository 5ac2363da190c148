"""The timing core on a CPU."""

import time

import pytest
import torch

from storyadapter.bench.timing import (
    MIN_LONG_REPEATS,
    MIN_REPEATS,
    Timing,
    buffer_sets,
    measure,
    measure_run,
    repeats_within,
)

CPU = torch.device("cpu")


def test_checks_first_then_rotates_over_the_buffers() -> None:
    seen: list[str] = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b")]
    timing = measure(calls, lambda: seen.append("check"), CPU, repeats=31, warmup_seconds=0.0)
    assert seen[0] == "check" and seen.count("check") == 1
    assert "".join(seen[-31:]) == "ab" * 15 + "a"
    assert len(timing.milliseconds) == 31 and min(timing.milliseconds) >= 0
    assert not timing.graph and timing.calls_per_region == 1


def test_nothing_is_timed_after_a_failed_check() -> None:
    def check() -> None:
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result"):
        measure([lambda: pytest.fail("was timed")], check, CPU)


@pytest.mark.parametrize(
    ("calls", "repeats", "text"), [([print], MIN_REPEATS - 1, "at least 30"), ([], 30, "no calls")]
)
def test_bad_requests_are_refused(calls: list, repeats: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        measure(calls, lambda: None, CPU, repeats=repeats)


def test_median_and_spread() -> None:
    timing = Timing(tuple(float(value) for value in range(101)), 2, True)
    assert timing.median == 50
    assert timing.spread == pytest.approx(80)
    few = Timing(timing.milliseconds[: repeats_within(1000.0, 30, 1.0)], 1, False)
    assert len(few.milliseconds) == 5 and few.spread < max(few.milliseconds) - min(few.milliseconds)
    assert timing.as_data()["raw_ms"] == list(timing.milliseconds)


def test_a_cpu_rotates_over_two_sets() -> None:
    assert buffer_sets(1, CPU) == 2


def test_long_regions_get_fewer_repeats_within_a_budget() -> None:
    assert repeats_within(400.0, 30, None) == 30
    assert repeats_within(99.9, 30, 0.001) == 30
    assert repeats_within(400.0, 30, 4.0) == 10
    assert repeats_within(400.0, 30, 0.1) == MIN_LONG_REPEATS
    assert repeats_within(100.0, 30, 1e6) == 30


def test_a_budget_ends_the_repeats_of_a_slow_call_and_not_of_a_fast_one() -> None:
    slow = measure([lambda: time.sleep(0.11)], lambda: None, CPU, warmup_seconds=0.0, budget_seconds=0.2)
    assert len(slow.milliseconds) == MIN_LONG_REPEATS
    assert min(slow.milliseconds) > 100
    fast = measure([lambda: None], lambda: None, CPU, warmup_seconds=0.0, budget_seconds=0.0)
    assert len(fast.milliseconds) == MIN_REPEATS


def test_a_run_is_timed_once() -> None:
    runs: list[int] = []

    def run() -> int:
        time.sleep(0.02)
        runs.append(1)
        return 7

    result, seconds = measure_run(run, CPU)
    assert (result, len(runs)) == (7, 1)
    assert 0.02 <= seconds < 1
