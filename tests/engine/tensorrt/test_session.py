"""What a session knows before anything reaches a GPU. Nothing here enqueues: no GPU here runs these engines."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from storyadapter.engine.opening import open_networks
from storyadapter.engine.tensorrt.networks import profile_for, read_profiles
from storyadapter.method.errors import UnavailableError
from storyadapter.model.contract import network_specs
from storyadapter.model.examples import example_inputs, example_letters
from storyadapter.model.networks import check_inputs
from storyadapter.model.numerics import Numerics, Precision
from tests.engine.tensorrt.building import LETTERS, RANGES, Built
from tests.refusals import raises_typed

pytest.importorskip("tensorrt_rtx")


def test_it_needs_nothing_but_pytorch_and_tensorrt() -> None:
    program = (
        "import sys, json, torch, tensorrt_rtx\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import storyadapter.engine.tensorrt.networks\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "ours = sorted(name for name in sys.modules if name.startswith('storyadapter'))\n"
        "print(json.dumps([sorted(after - before - set(sys.stdlib_module_names)), ours]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    others, ours = json.loads(done.stdout)
    assert others == ["storyadapter"]
    assert not any(name.startswith(("storyadapter.export", "storyadapter.checkpoint")) for name in ours)


def test_the_profiles_are_read_back(built: Callable[[Precision], Built]) -> None:
    build = built("fp16")
    profiles = read_profiles(build.engine.details)
    for name, spec in network_specs(build.checkpoint.geometry).items():
        whole = profiles[name][0]
        assert whole == {letter: LETTERS[letter] for letter in whole}
        assert len(profiles[name]) == (2 if "h" in whole else 1)
        assert spec.name == name


def test_a_size_with_a_profile_of_its_own_takes_it(built: Callable[[Precision], Built]) -> None:
    profiles = read_profiles(built("fp16").engine.details)
    values = {"B": 8, "P": 5, "G": 2, "R": 24, "M": 1, "h": 8, "w": 12}
    assert profile_for(profiles["denoiser"], values) == 1
    assert profile_for(profiles["denoiser"], values | {"w": 16}) == 0
    assert profile_for(profiles["text_encoder"], {"P": 5}) == 0


@pytest.mark.parametrize(
    ("letters", "told"),
    [
        ({"R": 25}, "denoiser: R = 25 is outside the engine's range 1..24"),
        ({"B": 9}, "denoiser: B = 9 is outside the engine's range 1..8"),
        ({"P": 9}, "denoiser: P = 9 is outside the engine's range 1..8"),
        ({"h": 16}, "denoiser: h = 16 is outside the engine's range 8..12"),
        ({"w": 4}, "denoiser: w = 4 is outside the engine's range 8..16"),
    ],
)
def test_a_letter_out_of_its_range_is_told_before_the_enqueue(
    built: Callable[[Precision], Built], letters: dict[str, int], told: str
) -> None:
    build = built("fp16")
    ranges = read_profiles(build.engine.details)["denoiser"][0]
    spec = network_specs(build.checkpoint.geometry)["denoiser"]
    usual = example_letters({**LETTERS, **ranges})
    options = {"precision": "fp16", "device": torch.device("cpu"), "letters": ranges}
    good = example_inputs(spec, usual, "fp16")
    assert check_inputs(spec, good, **options)["R"] == usual["R"]
    with pytest.raises(ValueError, match=f"^{told}$"):
        check_inputs(spec, example_inputs(spec, usual | letters, "fp16"), **options)


def test_running_without_a_gpu_is_one_line(built: Callable[[Precision], Built]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    build = built("fp16")
    with pytest.raises(UnavailableError, match="^backend tensorrt builds here but can't run here: there is no GPU .*$"):
        open_networks(
            build.checkpoint, backend="tensorrt", numerics=Numerics("fp16"), ranges=RANGES, engine_dir=build.store.root
        )


def test_fp32_is_refused(built: Callable[[Precision], Built]) -> None:
    told = "^backend tensorrt can't serve here: it can't run in fp32; expected --precision fp16 or bf16$"
    with raises_typed(UnavailableError, match=told):
        open_networks(built("fp16").checkpoint, backend="tensorrt")


def test_what_a_session_sets_is_there() -> None:
    """Python sets a misspelt attribute as well; no engine can be opened here to see what comes of it."""
    import tensorrt_rtx

    assert isinstance(tensorrt_rtx.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    assert "EAGER" in tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.__members__
    for name in ("set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"):
        assert callable(getattr(tensorrt_rtx.IRuntimeConfig, name))
