"""What TensorRT's acceptance asks of which machine, and those of its checks that need no GPU."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storyadapter.checkpoint import CheckpointPaths
from storyadapter.engine.backends import BACKENDS
from storyadapter.engine.tensorrt.acceptance import build, find_plugin, plan_for, plugin_layers
from storyadapter.engine.tensorrt.library import Library
from storyadapter.engine.tensorrt.networks import profile_for, read_profiles
from storyadapter.engine.tensorrt.worker import Layer, parse_layers
from storyadapter.engine.trial import Trial, TrialError
from storyadapter.method.errors import UnavailableError
from storyadapter.model.numerics import NUMBER_FORMATS, Precision
from tests.engine.tensorrt.building import OPTIONS, RANGES, Built

pytest.importorskip("tensorrt_rtx")

FULL, RTX = Library("tensorrt", "10.14.1.48"), Library("tensorrt-rtx", "1.7.1.116")
ANYWHERE = ("build", "load", "networks", "shapes", "graphs", "streams", "scratch")
FP8, INT8 = (tuple(f"{form} {what}" for what in ("build", "networks", "pictures")) for form in NUMBER_FORMATS)


@pytest.fixture
def trial(built: Callable[[Precision], Built]) -> Trial:
    """With the engine of the demo model that other tests read too."""
    paths = CheckpointPaths.given(None, None, None)
    return Trial("tensorrt", built("fp16").store.root, paths, RANGES, OPTIONS)


@pytest.mark.parametrize(
    ("library", "target", "embeds", "more", "left_out"),
    [
        (RTX, "sm89", False, ("runtime cache", "pictures", *FP8), ("plugin",)),
        (RTX, "sm86", False, ("runtime cache", "pictures", *INT8), ("plugin", "fp8")),
        (FULL, "sm90", True, ("timing cache", "plugin", "pictures", *FP8), ()),
        (FULL, "sm75", False, ("timing cache", "pictures"), ("plugin", "fp8", "int8")),
    ],
)
def test_a_machine_is_asked_for_all_that_it_can(
    library: Library, target: str, embeds: bool, more: Sequence[str], left_out: Sequence[str], trial: Trial
) -> None:
    plan = plan_for(library, target, trial, embeds=embeds)
    assert tuple(check.name for check in plan.checks) == (*ANYWHERE, *more)
    assert tuple(name for name, _ in plan.left_out) == left_out
    assert {check.name for check in plan.checks if check.number_format} == {*FP8, *INT8} & {*more}
    for check in plan.checks:  # they are sent to processes of their own, and told in a table
        assert check.run.__qualname__ == check.run.__name__ and len(check.what) <= 38 and len(check.name) <= 13


def test_what_was_built_is_told(trial: Trial) -> None:
    said = build(trial)
    told = r"tensorrt-rtx .* for sm89\+sm120, \d+ MiB, \d+ layers, of them \d+ attentions in one kernel, 0 products of "
    assert re.match(told, said), said
    assert "of them 0 attentions" not in said


def test_a_build_that_is_missing_or_damaged_is_told(trial: Trial, tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="^there is no engine: what builds it failed$"):
        find_plugin(replace(trial, folder=tmp_path))


def test_an_engine_without_the_plugin_is_told(trial: Trial) -> None:
    with pytest.raises(TrialError, match=r"^no layer of denoiser.engine is the plugin; there are .*gemm"):
        find_plugin(trial)
    layers = parse_layers((trial.engine().folder / "denoiser.layers").read_text())
    own = Layer("attn2", "PluginV3", ()), Layer("node_GlobalReferenceCrossAttention_3", "Extension", ())
    assert plugin_layers((*layers, *own)) == list(own)


def test_shapes_in_turn_meet_both_profiles(trial: Trial) -> None:
    """The largest size is that of the second profile where an acceptance builds one for it."""
    profiles = read_profiles(trial.engine().details)["denoiser"]
    own = {letter: allowed for letter, allowed in profiles[1].items() if letter in ("h", "w")}
    assert {letter: allowed.maximum for letter, allowed in own.items()} == {"h": 8, "w": 12}
    met = {profile_for(profiles, values) for values in trial.shapes()}
    assert met == {0, 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there may be a GPU that runs it")
def test_without_a_gpu_it_cant_be_accepted(tmp_path: Path) -> None:
    told = (
        "^backend tensorrt can't be accepted here: it builds here but can't run: there is no GPU that PyTorch can use$"
    )
    with pytest.raises(UnavailableError, match=told):
        BACKENDS["tensorrt"].acceptance_plan(tmp_path)
    assert BACKENDS["tensorrt"].acceptance() is None
    assert list(tmp_path.iterdir()) == []
