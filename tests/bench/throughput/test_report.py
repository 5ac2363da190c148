"""The report: shares, projections and pages, on numbers made by hand; and one real run of a few rungs."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from storyadapter.bench.throughput import command, ladder, run
from storyadapter.bench.throughput.cases import PUBLISHED, Case, StoryCase, chosen
from storyadapter.bench.throughput.kernel_classes import summarize
from storyadapter.bench.throughput.ladder import FAILED, MEASURED, NOT_RUN, WRONG, Comparison, RungResult
from storyadapter.bench.throughput.report import ThroughputReport, Undrawn, as_data, chart, markdown
from storyadapter.bench.throughput.story import StoryResult
from storyadapter.bench.throughput.workbench import Workbench
from storyadapter.bench.timing import Timing
from storyadapter.method.errors import InputError, RunError, UnavailableError

CASES = (Case("n16", 16, 8, 1024, 1024), Case("n100", 100, 8, 1024, 1024, rungs=("graphs",)))
STORY = StoryCase("story", 16, 2, 20, 8, 1024, 1024)


def _timing(milliseconds: float) -> Timing:
    return Timing((milliseconds,) * 30, 1, False)


def _rung(
    case: str, name: str, milliseconds: float, rows: int = 16, psnr: float | None = 50.0, **more: Any
) -> RungResult:
    compared = None if psnr is None else Comparison("below", psnr, 0.01)
    options = {"baseline": False, "peak_bytes": 2**34, "load": {"sm_clock_mhz": 1500.0, "watts": 650.0}, **more}
    return RungResult(
        case,
        name,
        f"what {name} adds",
        status=MEASURED,
        comparison=compared,
        rows=rows,
        timing=_timing(milliseconds),
        **options,
    )


FOUND = ThroughputReport(
    environment={"device": "GPU 1", "power limit": "700 W"},
    model="sdxl with random weights",
    precision="fp16",
    cases=CASES,
    stories=(STORY,),
    build_seconds={"inductor": 240.0},
    operations={"n16": 16 * 7 * 10**12, "n100": 16 * 8 * 10**12},
    matrix_flops=700e12,
    rungs=(
        _rung("n16", "published", 125.0, rows=2, psnr=None),
        RungResult("n16", "fused", "a kernel", False, NOT_RUN, "no | GPU"),
        RungResult("n16", "compiled", "compiled", False, WRONG, "12.0 dB", Comparison("published", 12.0, 0.5)),
        _rung("n16", "graphs", 200.0),
        _rung("n100", "graphs", 250.0),
        _rung("n16", "diffusers", 100.0, baseline=True),
    ),
    drawn=[
        StoryResult(
            "story", "overlapped", "bf16", 30.0, {"denoise": 24.0, "decode": 9.0}, 16, 48, 1920, 41.0, True, 2**35, 8
        ),
    ],
    undrawn=[Undrawn("story: overlapped, VAE in fp32", FAILED, "RuntimeError: broke")],
    profiled=[("n16", "graphs", summarize([("grca_kernel", 5.0), ("nvjet_x", 95.0)]))],
    gpu_price=3.6,
)


def test_numbers_by_hand() -> None:
    data = as_data(FOUND)
    rungs = {(rung["case"], rung["rung"]): rung for rung in data["rungs"]}
    published, graphs = rungs["n16", "published"], rungs["n16", "graphs"]
    assert published["rows_per_second"] == pytest.approx(16) and graphs["rows_per_second"] == pytest.approx(80)
    assert graphs["tflops"] == pytest.approx(560) and graphs["matrix_share"] == pytest.approx(0.8)
    assert graphs["seconds_per_frame"] == pytest.approx(2 * 50 * 11 / 80)
    assert graphs["money_per_frame"] == pytest.approx(2 * 50 * 11 / 80 * 3.6 / 3600)
    assert "rows_per_second" not in rungs["n16", "fused"] and rungs["n16", "compiled"]["status"] == "wrong"
    (story,) = data["stories"]
    assert story["rows_per_second"] == pytest.approx(64) and story["share_of_unet_rate"] == pytest.approx(0.8)
    assert story["stage_shares"] == pytest.approx({"denoise": 0.8, "decode": 0.3})
    assert story["seconds_per_frame"] == pytest.approx(30 / 16)
    assert story["money_per_frame"] == pytest.approx(30 / 16 * 0.001)
    cost = {
        "rung": "graphs",
        "rows_per_second": {"16": pytest.approx(80), "100": pytest.approx(64)},
        "most_over_fewest": pytest.approx(0.8),
    }
    assert data["cost_over_references"] == [cost]


def test_a_quantized_denoiser_stands_beside_half_precision() -> None:
    fast = dataclasses.replace(FOUND.drawn[0], way="overlapped, fp8", seconds=20.0, psnr=25.0, number_format="fp8")
    rungs = (*FOUND.rungs, *(_rung(case, "fp8", ms, number_format="fp8") for case, ms in (("n16", 160), ("n100", 200))))
    both = dataclasses.replace(FOUND, rungs=rungs, drawn=[*FOUND.drawn, fast])
    data, before = as_data(both), as_data(FOUND)
    assert [story["share_of_unet_rate"] for story in data["stories"]] == pytest.approx([0.8, 0.96])
    assert data["stories"][0] | {"number_format": None} == before["stories"][0]
    assert [cost["rung"] for cost in data["cost_over_references"]] == ["graphs", "fp8"]
    assert [item["rows_per_second"] for item in data["published_workload"]] == pytest.approx([64, 80])
    assert "| overlapped, fp8 | bf16 | 8 | 20.00 |" in markdown(json.loads(json.dumps(data)))


def test_the_projection_by_hand() -> None:
    (item,) = as_data(FOUND)["published_workload"]
    assert PUBLISHED.unet_rows == 2 * 50 * 1100 == item["rows"]
    rest = (30 - 1920 / 80) / 48
    assert item["rest_seconds_per_drawn_frame"] == pytest.approx(rest)
    assert item["seconds"] == pytest.approx(110_000 / 64 + 1100 * rest)
    assert item["seconds_per_frame"] == pytest.approx(item["seconds"] / 100)


def test_a_story_in_other_micro_batches_has_no_case_of_the_ladder() -> None:
    """As where memory is short, or a micro-batch was halved: its UNet calls had fewer rows than those measured."""
    halved = dataclasses.replace(FOUND, drawn=[dataclasses.replace(FOUND.drawn[0], at_once=4)])
    data = as_data(halved)
    assert data["stories"][0]["share_of_unet_rate"] is None and data["published_workload"] == []
    by_memory = dataclasses.replace(FOUND, stories=(dataclasses.replace(STORY, max_frames=None),))
    assert as_data(by_memory)["stories"][0]["share_of_unet_rate"] == pytest.approx(0.8)


def test_the_page_says_what_was_found() -> None:
    page = markdown(json.loads(json.dumps(as_data(FOUND))))
    for line in (
        "| device | GPU 1 |",
        "The engine of the backend inductor was built in 240 s; nothing below counts that.",
        "## n16: 16 references, 1024x1024, 8 frames at once (B = 16)",
        "| published | 16.00 | 125.00 (B = 2) | 0.00 | 112 | 16.0% | 16.0 | 68.8 | 0.06875 | - | 1500 MHz, 650 W |",
        "| graphs | 80.00 | 200.00 (B = 16) | 0.00 | 560 | 80.0% | 16.0 | 13.8 | 0.01375 | 50.0 dB (below) "
        "| 1500 MHz, 650 W |",
        "| fused | not run | - | - | - | - | - | - | - | - | - |",
        "- fused: not run: no | GPU",
        "| compiled | wrong | - | - | - | - | - | - | - | 12.0 dB (published) | - |",
        "- compiled: wrong: 12.0 dB",
        "- story: overlapped, VAE in fp32: failed: RuntimeError: broke",
        "| overlapped | bf16 | 8 | 30.00 | 1.88 | 64.00 | 80.0% | 24.00 s, 80% | 9.00 s, 30% | 32.0 | 0.00187 "
        "| 41.0 dB |",
        "2 kernels of together 100.0 ms, by torch.profiler, in a step of 200.0 ms.",
        "| grca | 5.00 | 5.0% |",
        "| matrix products | 95.00 | 95.0% |",
        "graphs: 80.00 rows/s at N = 16, 64.00 rows/s at N = 100; the rate with the most references is 80.0% of that "
        "with the fewest.",
    ):
        assert line in page.splitlines()
    assert "| diffusers (baseline) | 160.00 |" in page


def test_the_chart_has_a_bar_per_measured_rung_as_long_as_its_rate() -> None:
    picture = chart(as_data(FOUND))
    own, baseline = (38, 98, 186), (170, 174, 180)

    def lengths(color: tuple[int, int, int]) -> list[int]:
        rows = [sum(picture.getpixel((x, y)) == color for x in range(picture.width)) for y in range(picture.height)]
        starts = [y for y in range(1, picture.height) if rows[y] and not rows[y - 1]]
        return [rows[y] for y in starts]

    published, graphs, graphs_100 = lengths(own)
    (diffusers,) = lengths(baseline)
    assert published / diffusers == pytest.approx(16 / 160, rel=0.02)
    assert graphs / diffusers == pytest.approx(80 / 160, rel=0.02)
    assert graphs_100 / diffusers == pytest.approx(64 / 160, rel=0.02)


def test_names_of_cases() -> None:
    assert chosen(None, CASES, "--cases") == CASES
    assert chosen(["n100"], CASES, "--cases") == CASES[1:]
    with pytest.raises(InputError, match="--cases n7: expected some of n16,n100"):
        chosen(["n7"], CASES, "--cases")


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("--smoke", "--synthetic-weights", "sdxl"), InputError, "--smoke is for the toy model"),
        (("--smoke", "--base-model", "x"), InputError, "expected one of --base-model"),
        (("--smoke", "--lora", "x"), InputError, "--lora with random weights; expected one of --lora, "),
        (("--smoke", "--rungs", "fastest"), InputError, "--rungs fastest: expected some of published,"),
        (("--smoke", "--cases", "story", "--rungs", "graphs"), InputError, "none of these --rungs runs any of these"),
        (("--synthetic-controlnets", "1"), InputError, "is given; expected --synthetic-weights or --smoke with it"),
        (("--smoke", "--cases", "control"), InputError, "--cases control: expected some of n3,n5,story"),
        (("--smoke", "--cases", "n16"), InputError, "--cases n16: expected some of n3,n5,story"),
    ],
)
def test_refusals(words: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        command.run(_options(*words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_told() -> None:
    with pytest.raises(UnavailableError, match="takes hours on a CPU; expected a CUDA GPU, or --smoke"):
        command.run(_options("--synthetic-weights", "sdxl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_has_no_memory_to_hold() -> None:
    with pytest.raises(UnavailableError, match="--device-memory is for a CUDA GPU; the device is cpu"):
        command.run(_options("--smoke", "--device-memory", "15.5"))


def test_a_few_rungs_from_the_options_to_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "WARMUP_SECONDS", 0.0)
    words = (
        "--smoke",
        "--synthetic-controlnets",
        "1",
        "--cases",
        "n3,control",
        "--rungs",
        "batched,cached,diffusers",
        "--gpu-price",
        "1",
    )
    assert command.run(_options(*words, "--out", str(tmp_path / "new" / "v1.2"))) == 0
    printed = capsys.readouterr()
    page = (tmp_path / "new" / "v1.2.md").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "new" / "v1.2.json").read_text(encoding="utf-8"))
    assert printed.out.strip() == page.strip()
    assert "[4/4" in printed.err
    assert [rung["status"] for rung in data["rungs"]] == [MEASURED] * 4
    assert [rung["case"] for rung in data["rungs"]] == ["n3", "n3", "control", "n3"]
    assert 1.2 < data["cases"][1]["operations"] / data["cases"][0]["operations"] < 1.6
    assert {"device", "torch", "diffusers", "commit", "command"} <= set(data["environment"])
    assert data["rungs"][1]["compared_with"]["other"] == "batched"
    assert data["published_workload"] == [] and bool(data["kernels"]) == torch.cuda.is_available()
    with Image.open(tmp_path / "new" / "v1.2.png") as picture:
        assert picture.width == 1200


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_time_is_spent_on_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file can't be made: "):  # before the missing GPU is
        command.run(_options("--synthetic-weights", "sdxl", "--out", str(tmp_path / "file" / "report")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_fp8_is_refused_before_the_model_is_calibrated() -> None:
    with pytest.raises(UnavailableError, match="it can't run in fp8 on cpu"):
        command.run(_options("--smoke", "--precision", "fp8"))


@pytest.mark.parametrize(
    ("case", "few", "fp8", "expected"),
    [
        (STORY, False, False, ["one after the other", "overlapped", "overlapped"]),
        (STORY, True, False, ["overlapped"]),
        (STORY, False, True, ["overlapped", "overlapped, fp8"]),
        (STORY, True, True, ["overlapped", "overlapped, fp8"]),
    ],
)
def test_ways_of_a_story(case: StoryCase, few: bool, fp8: bool, expected: list[str]) -> None:
    ways = run._ways(case, "bf16", few=few, fp8=fp8)
    assert [way.name for way in ways] == expected and [way.quantized for way in ways] == ["fp8" in w for w in expected]


def test_a_report_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "WARMUP_SECONDS", 0.0)
    (tmp_path / "report.png").mkdir()
    words = ("--smoke", "--cases", "n3", "--rungs", "cached", "--out", str(tmp_path / "report"))
    with pytest.raises(RunError, match=r"report\.png can't be written: Is a directory$"):
        command.run(_options(*words))
    assert "| cached | " in capsys.readouterr().out


def test_wrong_pictures_give_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(ladder, "MIN_PSNR", 1000.0)
    assert command.run(_options("--smoke", "--cases", "n3", "--rungs", "batched,sdpa")) == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnavailableError("the last build: failed: no compiler"), NOT_RUN, 0),
        (RuntimeError("the story was: not run: by chance"), FAILED, 1),
    ],
)
def test_a_story_has_failed_by_the_kind_of_its_error_whatever_that_says(
    error: Exception, status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(workbench: Workbench, backend: str, *, quantized: bool) -> NoReturn:
        raise error

    monkeypatch.setattr(Workbench, "networks", refuse)
    assert command.run(_options("--smoke", "--cases", "story")) == code
    assert f"- story: overlapped, VAE in fp32: {status}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "words", "message"),
    [
        ("--gpu-price", "cheap", "is not a price such as 2.5"),
        ("--gpu-price", "-1", "is not a price such as 2.5"),
        ("--device-memory", "much", "is not a size in GiB such as 15.5"),
        ("--device-memory", "0", "is not a size in GiB such as 15.5"),
    ],
)
def test_numbers_are_checked(option: str, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _options(option, words)
    assert message in capsys.readouterr().err
