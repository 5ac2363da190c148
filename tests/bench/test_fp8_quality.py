"""A quantized model beside the exact one: the rule, and scales that are deliberately wrong."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from storyadapter.bench import fp8_quality, quality
from storyadapter.bench.fp8_quality import Fp8Quality, Ratios, compare, multiplied, shuffled
from storyadapter.bench.quality_run import Estimate
from storyadapter.demo.shipped import MODEL
from storyadapter.engine import calibration
from storyadapter.method.errors import InputError
from storyadapter.quantization.recipe import FP8
from storyadapter.quantization.scales import Scales

SCALES = Scales(FP8, "model", {f"layer{n}": float(2 ** (n // 2)) for n in range(8)})
PSNR = Ratios(40.0, 30.0)


def test_wrong_scales() -> None:
    assert multiplied(4.0)(SCALES).inputs == {name: 4 * value for name, value in SCALES.inputs.items()}
    other = shuffled(SCALES).inputs
    assert other.keys() == SCALES.inputs.keys() and sorted(other.values()) == sorted(SCALES.inputs.values())
    assert other != SCALES.inputs and shuffled(SCALES).inputs == other
    for n in range(0, 8, 2):  # layers with one input
        assert other[f"layer{n}"] == other[f"layer{n + 1}"]


@pytest.mark.parametrize(
    ("consistent", "faithful", "holds"), [(0.0, 0.0, True), (0.1, 0.1, True), (-0.05, 0.0, False), (0.0, -0.05, False)]
)
def test_the_rule_asks_that_neither_falls(consistent: float, faithful: float, holds: bool) -> None:
    exact = np.random.default_rng(0).uniform(0.2, 0.8, (2, 20))
    found = compare("fp8", (exact[0] + consistent, exact[1] + faithful), (exact[0], exact[1]), PSNR, PSNR)
    assert found.holds == holds
    # paired: stories that differ widely from each other don't widen the interval of the difference
    assert found.consistency_less_exact.high - found.consistency_less_exact.low < 1e-9
    assert found.consistency.high - found.consistency.low > 0.05


def test_controls_must_be_found_out() -> None:
    exact = np.full(20, 0.5)
    good, bad = (compare(name, (exact + by, exact), (exact, exact), PSNR, PSNR) for name, by in (("fp8", 0), ("x", -1)))
    named = fp8_quality.MUST_FAIL[0]
    spoilt, missed = (Fp8Quality((Estimate(0, 0, 0),) * 2, (good, each), "") for each in (bad, good))
    assert spoilt.holds() and not Fp8Quality((Estimate(0, 0, 0),) * 2, (bad,), "").holds()
    hidden = Fp8Quality(missed.exact, (good, compare(named, (exact, exact), (exact, exact), PSNR, PSNR)), "")
    assert not hidden.holds()
    assert "| fp8 | 0.500 [0.500, 0.500] |" in spoilt.table() and "| holds | 40.0 / 30.0 |" in spoilt.table()


@pytest.mark.parametrize(
    ("quantized", "name"),
    [
        (["--precision", "fp8"], "fp8"),
        (["--vae-precision", "fp8"], "VAE fp8"),
        (["--precision", "fp8", "--vae-precision", "fp8"], "fp8, VAE fp8"),
    ],
)
def test_from_the_options_to_the_file(
    quantized: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    story = next(calibration.calibration_stories())
    monkeypatch.setattr(calibration, "calibration_stories", lambda: iter([story]))
    monkeypatch.setitem(calibration.find_or_make_scales.__kwdefaults__, "steps", 1)
    for of in ("", "VAE_"):
        monkeypatch.setattr(fp8_quality, f"{of}CONTROLS", {"scales / 16": multiplied(1 / 16)})
        monkeypatch.setattr(fp8_quality, f"{of}MUST_FAIL", ("scales / 16",))
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    words = ["--model", str(MODEL), "--stories", "2", "--frames", "2", "--seeds", "1", "--iterations", "1"]
    words += [*quantized, "--steps", "2", "--engine-dir", str(tmp_path / "engines"), "--out", str(tmp_path)]
    quality.run(parser.parse_args(words))
    assert "calibrated in" in capsys.readouterr().out
    found = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    good, bad = found["modes"]
    assert found["holds"].keys() == {name, "scales / 16"}
    assert 20 < good["given_references"]["median"] < 99  # near, and not the same
    assert bad["given_references"]["median"] < good["given_references"]["median"] - 5


@pytest.mark.parametrize("option", ["--precision", "--vae-precision"])
def test_studies_judge_no_quantized_model(option: str) -> None:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    with pytest.raises(InputError, match="^fp8 or int8 with --study edit; expected --study method, which judges them$"):
        quality.run(parser.parse_args(["--study", "edit", option, "fp8"]))
