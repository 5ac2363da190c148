"""The ladder on the toy model: all ways draw the same, and one that doesn't is seen and not timed."""

import dataclasses
import functools
from collections.abc import Callable
from io import StringIO

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import Progress
from storyadapter.bench.throughput import ladder, published, rungs
from storyadapter.bench.throughput.cases import SMOKE_CASES, SMOKE_STORIES, Case, ranges
from storyadapter.bench.throughput.command import BASELINES as BASELINE_NAMES
from storyadapter.bench.throughput.command import RUNGS as RUNG_NAMES
from storyadapter.bench.throughput.inputs import SCALE, CaseInputs, make_inputs
from storyadapter.bench.throughput.ladder import (
    FAILED,
    MEASURED,
    NOT_RUN,
    WRONG,
    Drawing,
    Ladder,
    Pictures,
    RungResult,
    WrongPictures,
    check_drawing,
    compare,
)
from storyadapter.bench.throughput.rungs import BASELINES, FP8, LADDER, Rung, Steps
from storyadapter.bench.throughput.workbench import Workbench, with_eager_vae
from storyadapter.method.errors import EngineBuildError, UnavailableError
from storyadapter.model.grca import grca
from storyadapter.runtime.psnr import EQUAL, MIN_PSNR

CASE = Case("both", 3, 2, 64, 96)
OTHER = Case("other", 2, 1, 64, 64, rungs=("published", "cached"))
BY_NAME = {rung.name: rung for rung in (*LADDER, *BASELINES)}


@pytest.fixture(scope="module")
def told() -> StringIO:
    return StringIO()


@pytest.fixture(scope="module")
def climb(told: StringIO) -> Ladder:
    model = BenchmarkModel.synthetic("toy", EngineChoice("eager", "fp32"), torch.device("cpu"))
    workbench = Workbench(model, ranges((CASE, OTHER), ()), Progress(9, told))
    eager = workbench.eager(grca)
    inputs = make_inputs(eager, model.tokenizers(), (CASE, OTHER), model.prediction_type)
    pictures = Pictures(with_eager_vae(eager, model, "fp32")["vae_decoder"], model.device)
    return Ladder(workbench, inputs, pictures, workbench.progress)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(ladder, "BUDGET_SECONDS", None)  # else a busy machine gets fewer repeats


def test_all_ways_draw_the_same(climb: Ladder, told: StringIO) -> None:
    ways = [BY_NAME[name] for name in ("published", "batched", "sdpa", "cached")]
    results = climb.run(ways, [BY_NAME["diffusers"]])
    assert [(r.case, r.rung, r.status) for r in results] == [
        ("both", "published", MEASURED),
        ("other", "published", MEASURED),
        ("both", "batched", MEASURED),
        ("both", "sdpa", MEASURED),
        ("both", "cached", MEASURED),
        ("other", "cached", MEASURED),
        ("both", "diffusers", MEASURED),
    ]
    compared = {(r.case, r.rung): r.comparison for r in results}
    assert compared["both", "published"] is None
    below = {key: comparison.other for key, comparison in compared.items() if comparison is not None}
    assert below == {
        ("both", "batched"): "published",
        ("both", "sdpa"): "batched",
        ("both", "cached"): "sdpa",
        ("other", "cached"): "published",
        ("both", "diffusers"): "cached",
    }
    assert all(c.psnr > 80 and c.latents < 1e-4 for c in compared.values() if c is not None)
    assert [r.rows for r in results] == [2, 2, 4, 4, 4, 2, 4]
    for result in results:
        assert result.timing is not None and len(result.timing.milliseconds) == 30
        assert result.rows_per_second == pytest.approx(result.rows / result.timing.median * 1e3)
    assert "both: cached" in told.getvalue() and "s left" in told.getvalue()


def _rung(prepare: Callable[[Workbench], Steps], name: str = "other") -> Rung:
    return Rung(name, "something", prepare)


def _half_scale(workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet()
    published.install(unet, adapter, scaled_dot_product_attention, SCALE / 2)
    return functools.partial(published.published_steps, unet, adapter)


def _swapped_frames(workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet()
    published.install(unet, adapter, scaled_dot_product_attention, SCALE)
    return lambda inputs, table, frames: published.published_steps(unet, adapter, inputs, table, frames[::-1])


def _one_reference_less(workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet()
    published.install(unet, adapter, scaled_dot_product_attention, SCALE)

    def steps(inputs: CaseInputs, *rest: object):
        fewer = dataclasses.replace(inputs, image_embedding=inputs.image_embedding[1:])
        return published.published_steps(unet, adapter, fewer, *rest)

    return steps


def _not_finite(workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet()
    published.install(unet, adapter, scaled_dot_product_attention, float("inf"))
    return functools.partial(published.published_steps, unet, adapter)


@pytest.mark.parametrize("mistake", [_half_scale, _swapped_frames, _one_reference_less, _not_finite])
def test_a_mistake_is_seen_and_not_timed(
    climb: Ladder, mistake: Callable[[Workbench], Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = _rung(mistake)
    one_case = dataclasses.replace(climb, inputs={"both": climb.inputs["both"]})
    right, found, after = one_case.run([BY_NAME["sdpa"], wrong, BY_NAME["batched"]], [])
    assert (right.status, found.status, after.status) == (MEASURED, WRONG, MEASURED)
    assert found.timing is None and found.rows_per_second is None and found.reason
    assert after.comparison is not None and after.comparison.other == "sdpa"  # never with what was wrong


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UnavailableError("no such thing here"), NOT_RUN, "no such thing here"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 5 GiB. GPU 0 has"),
            NOT_RUN,
            "doesn't fit: CUDA out of memory",
        ),
        (EngineBuildError("denoiser differs from eager"), FAILED, "denoiser differs from eager"),
        (RuntimeError("\nlibrary broke\nmore"), FAILED, "RuntimeError: library broke"),
    ],
)
def test_what_cant_run_is_told(climb: Ladder, error: Exception, status: str, reason: str) -> None:
    def prepare(workbench: Workbench) -> Steps:
        raise error

    one_case = dataclasses.replace(climb, inputs={"both": climb.inputs["both"]})
    (result,) = one_case.run([_rung(prepare)], [])
    assert result.status == status and reason in result.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_rungs_for_gpus_say_so_without_one(climb: Ladder) -> None:
    one_case = dataclasses.replace(climb, inputs={"both": climb.inputs["both"]})
    names = ("fused", "graphs", "diffusers-compile", "tensorrt")
    results = one_case.run([BY_NAME[name] for name in names], [])
    assert {result.status for result in results} == {NOT_RUN}
    assert all(result.reason for result in results)


def test_baselines_and_rungs_run_their_cases() -> None:
    everything, some = CASE, OTHER
    assert ladder.runs(BY_NAME["diffusers"], everything) and not ladder.runs(BY_NAME["diffusers"], some)
    assert ladder.runs(BY_NAME["cached"], some) and not ladder.runs(BY_NAME["sdpa"], some)


def test_names_of_the_options_are_those_of_the_rungs() -> None:
    assert (*(rung.name for rung in LADDER), "overlapped") == RUNG_NAMES
    assert tuple(rung.name for rung in BASELINES) == BASELINE_NAMES
    assert all(rung.baseline for rung in BASELINES) and not any(rung.baseline for rung in LADDER)
    for case in SMOKE_CASES:
        assert set(case.rungs or ()) <= {*RUNG_NAMES, FP8.name}


def test_an_engine_must_serve_all_cases() -> None:
    found = ranges(SMOKE_CASES, SMOKE_STORIES)
    assert (found.max_frames, found.max_references) == (2, 5)
    assert (found.height.minimum, found.height.maximum) == (64, 64)


def test_contract_steps_draw_whole_cases_alone(climb: Ladder) -> None:
    inputs = climb.inputs["both"]
    with pytest.raises(ValueError, match="expected all 2"):
        next(rungs.contract_steps(climb.workbench.eager(grca), inputs, inputs.table, range(1)))


def test_rows_per_second_by_hand() -> None:
    assert RungResult("c", "r", "", False, NOT_RUN).rows_per_second is None


def test_pictures_that_are_not_finite_are_no_likeness() -> None:
    latents, pictures = torch.ones(2, 4, 1, 1), torch.zeros(2, 3, 8, 8)
    right = Drawing(latents, pictures)
    assert compare("below", right, right).psnr == EQUAL
    broken = Drawing(latents, torch.full_like(pictures, torch.nan))
    assert not compare("below", broken, right).psnr >= MIN_PSNR
    with pytest.raises(WrongPictures, match="its pictures have values that are not finite"):
        check_drawing(broken, None)
    with pytest.raises(WrongPictures, match="its latents have values that are not finite"):
        check_drawing(Drawing(latents * torch.inf, pictures), None)
    check_drawing(right, compare("below", right, right))
