"""What is said of a server under load, and of a story on several devices."""

from storyadapter.bench import serve_run, workers_run
from storyadapter.bench.serve_run import ServeReport
from storyadapter.bench.workers_run import Drawn, WorkersReport


def report(**changes: object) -> ServeReport:
    values = {
        "environment": {"device": "CPU"},
        "load": {"stories": 2, "rate": None},
        "seconds": 30.0,
        "outcomes": {"completed": 1, "cancelled": 1},
        "frames": 15,
        "redrawn": 1,
        "latencies": {"until the end": {"p50": 1.0, "p90": 2.0, "p95": 3.0, "p99": 4.0}},
        "memory": [[400 << 20], [100 << 20, 200 << 20, 300 << 20, 220 << 20]],
        "kills": 5,
        "worker_kills": 0,
        "worst_psnr": [],
        "problems": [],
    }
    return ServeReport(**{**values, **changes})


def test_the_page_tells_what_was_seen() -> None:
    page = serve_run.markdown(report())
    assert "Passed." in page and "1 cancelled, 1 completed" in page
    assert "4.0 stories a minute, 0.50 frames a second" in page
    assert "400 MiB at most; from the second quarter of its last life to the last quarter 1.100 times" in page
    assert "none compared" in page and "90.0 dB, 81.3 dB" in serve_run.markdown(report(worst_psnr=[90.0, 81.3]))
    assert "| until the end | 1.000 | 2.000 | 3.000 | 4.000 |" in page
    assert "rate" not in page
    failed = report(problems=["story a ended with 3 frames"])
    assert "**Failed:**\n- story a ended with 3 frames" in serve_run.markdown(failed)
    assert serve_run.as_data(failed)["passed"] is False


def test_percentiles_lie_between_what_was_measured() -> None:
    found = serve_run.percentiles([float(number) for number in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert serve_run.percentiles([2.0])["p99"] == 2.0


def test_several_workers_are_compared_with_one() -> None:
    one = Drawn("this process", 1, 4, 16, 3.0, 10.0, [100.0])
    two = Drawn("2 workers", 1, 4, 16, 4.0, 5.0, [85.25])
    served = Drawn("a server here", 4, 1, 16, 0.0, 10.0, [])
    page = workers_run.markdown(WorkersReport({}, "sdxl", "eager", "fp32", 0, 2, 2, True, [one, two, served]))
    assert "| 2 workers | 1 | 4 | 4.0 | 5.00 | 3.20 | 2.000 | 85.2 |" in page
    assert "| a server here | 4 | 1 | 0.0 | 10.00 | 1.60 | 1.000 |  |" in page
    assert "1145.8 minutes by this process, 572.9 minutes by 2 workers." in page
