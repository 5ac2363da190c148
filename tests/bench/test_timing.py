"""The timing core on a CPU."""

import pytest
import torch

from storyadapter.bench.timing import MIN_REPEATS, Timing, buffer_sets, measure

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
    timing = Timing(tuple(float(value) for value in range(1, 100)), 2, True)
    assert timing.median == 50
    assert timing.spread == pytest.approx(80)
    assert timing.as_data()["raw_ms"] == list(timing.milliseconds)


def test_a_cpu_rotates_over_two_sets() -> None:
    assert buffer_sets(1, CPU) == 2
