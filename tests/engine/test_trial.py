"""What any backend's networks must do, asked of ONNX Runtime's, and of some that don't do it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from storyadapter.checkpoint import CheckpointPaths
from storyadapter.engine import trial as trials
from storyadapter.engine.trial import Trial, TrialError
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.networks import Network
from tests.engine.wrong_networks import Changed, wrong

ALL = (
    *(trials.build, trials.load, trials.compare_networks, trials.compare_shapes),
    *(trials.compare_repeated, trials.compare_interleaved, trials.compare_pictures),
)


@pytest.fixture(scope="module")
def trial(tiny_model_dir: Path, tiny_engine_dir: Path) -> Trial:
    paths = CheckpointPaths(tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors")
    ranges = ShapeRanges(3, 100, Range(64, 64), Range(64, 64))
    return Trial("onnxruntime", tiny_engine_dir, paths, ranges, precision="fp32", frames=3, steps=2)


@pytest.mark.parametrize("check", ALL)
def test_onnxruntime_passes(trial: Trial, check: Callable[[Trial], str]) -> None:
    said = check(trial)
    assert said and "\n" not in said


def test_without_an_engine_each_check_says_why(trial: Trial, tmp_path: Path) -> None:
    for check in ALL[1:]:
        with pytest.raises(TrialError, match="^there is no engine: what builds it failed$"):
            check(replace(trial, folder=tmp_path))


def test_a_network_that_computes_something_else(trial: Trial) -> None:
    def change(name: str, network: Network) -> Network:
        louder = Changed(network, gives=lambda outputs: {key: value * 1.01 for key, value in outputs.items()})
        return louder if name == "denoiser" else network

    for check in (trials.compare_networks, trials.compare_shapes):
        with pytest.raises(EngineBuildError, match=r"^denoiser.*: output noise differs from eager by 1\.00e-02"):
            check(wrong(trial, change))


def test_a_network_that_is_wrong_at_one_size_alone(trial: Trial) -> None:
    def given(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        rows = len(inputs["latents"])
        return inputs if rows != 4 else {**inputs, "latents": inputs["latents"] * 1.1}

    changed = wrong(trial, lambda name, network: Changed(network, given) if name == "denoiser" else network)
    trials.compare_networks(changed)
    with pytest.raises(EngineBuildError, match=r"^denoiser at {'B': 4, .* differs from eager"):
        trials.compare_shapes(changed)


def test_inputs_that_are_read_once(trial: Trial) -> None:
    """As a captured graph that reads from memory of its own would."""
    seen: dict[int, Mapping[str, Tensor]] = {}

    def given(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return seen.setdefault(inputs["latents"].data_ptr(), {name: value.clone() for name, value in inputs.items()})

    changed = wrong(trial, lambda name, network: Changed(network, given) if name == "denoiser" else network)
    with pytest.raises(TrialError, match="^a call gave other bytes than one with equal values at other addresses$"):
        trials.compare_repeated(changed)


def test_inputs_that_are_never_read(trial: Trial) -> None:
    def given(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        kept = ("text_row", "ref_row", "ref_length")
        return {key: value if key in kept else torch.ones_like(value) for key, value in inputs.items()}

    def change(name: str, network: Network) -> Network:
        return Changed(network, given, lambda outputs: {"noise": torch.ones_like(outputs["noise"])})

    with pytest.raises(TrialError, match="^other inputs gave the same result$"):
        trials.compare_repeated(wrong(trial, change))


def test_memory_that_one_network_takes_from_another(trial: Trial) -> None:
    """What the denoiser keeps from its first call is gone when others were called since."""
    owner = ""

    def change(name: str, network: Network) -> Network:
        def gives(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal owner
            owner = name if name == "vae_decoder" else owner
            return {key: value + (name == "denoiser" and owner != "") for key, value in outputs.items()}

        return Changed(network, gives=gives)

    with pytest.raises(TrialError, match="^denoiser: noise is another when networks are called in turn$"):
        trials.compare_interleaved(wrong(trial, change))


def test_references_that_count_less_than_they_should(trial: Trial) -> None:
    def given(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**inputs, "scale": inputs["scale"] * 0.7}

    changed = wrong(trial, lambda name, network: Changed(network, given) if "scale" in inputs_of(network) else network)
    with pytest.raises(TrialError, match=r"^6 frames, median .* dB, worst .* dB: too far from eager's$"):
        trials.compare_pictures(changed)


def inputs_of(network: Network) -> set[str]:
    return {tensor.name for tensor in network.spec.inputs}


def test_shapes_are_many_and_within_the_ranges(trial: Trial) -> None:
    wide = replace(trial, ranges=ShapeRanges(4, 16, Range(64, 128), Range(96, 160)))
    letters = wide.ranges.letters()
    shapes = list(wide.shapes())
    assert shapes[0] == {name: allowed.maximum for name, allowed in letters.items()}
    for values in shapes:
        assert all(values[name] in allowed for name, allowed in letters.items())
        assert values["h"] % 4 == values["w"] % 4 == 0
    assert len({tuple(values.items()) for values in shapes}) == len(shapes) == 12
    assert len({(values["h"], values["w"]) for values in shapes}) > 3
