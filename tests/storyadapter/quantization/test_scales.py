"""Scales as data: read back, keyed, refused in one line, and put into a denoiser."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.method.errors import InputError
from storyadapter.model.contract import network_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.grca import grca
from storyadapter.model.numerics import NUMBER_FORMATS
from storyadapter.model.unet import Denoiser, split_unet
from storyadapter.quantization.calibration import calibrate
from storyadapter.quantization.layers import OPERANDS, QuantizedLayer
from storyadapter.quantization.recipe import FP8, INT8, RECIPES, Recipe
from storyadapter.quantization.scales import RECIPE_NAME, SCALES_NAME, Scales

MODEL = "0123456789abcdef"


def _denoiser(checkpoint: Checkpoint) -> Denoiser:
    return split_unet(checkpoint.load("unet", torch.float32), checkpoint.load_ip_adapter(torch.float32), grca)[
        "denoiser"
    ].eval()


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    spec = network_specs(checkpoint.geometry)["denoiser"]
    return tuple(example_inputs(spec, {"B": 3, "P": 2, "G": 2, "R": 7, "M": 1, "h": 8, "w": 12}, "fp32").values())


@pytest.fixture(scope="module", params=NUMBER_FORMATS)
def scales(checkpoint: Checkpoint, inputs: tuple[torch.Tensor, ...], request: pytest.FixtureRequest) -> Scales:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    denoiser, recipe = _denoiser(checkpoint), RECIPES[request.param]
    with torch.no_grad():
        return Scales(recipe, MODEL, *calibrate(denoiser, recipe, lambda: denoiser(*inputs)))


def test_calibration_finds_the_largest_input_of_every_layer(
    checkpoint: Checkpoint, inputs: tuple[torch.Tensor, ...], scales: Scales
) -> None:
    denoiser = _denoiser(checkpoint)
    layers, largest = scales.recipe.layers(denoiser), {}

    def measure(name: str) -> Callable[..., None]:
        factors = torch.tensor(scales.smoothing.get(name, 1.0))
        return lambda _, given: largest.update({name: float((given[0] * factors).abs().max())})

    for name, layer in layers.items():
        layer.register_forward_pre_hook(measure(name))
    with torch.no_grad():
        denoiser(*inputs)
    assert scales.inputs.keys() == layers.keys() and len(layers) > 20
    greatest = OPERANDS[scales.recipe.number_format].largest
    assert scales.inputs == pytest.approx({name: value / greatest for name, value in largest.items()}, rel=1e-5)


@torch.no_grad()
def test_smoothing_factors_are_those_of_smoothquant(capsys: pytest.CaptureFixture[str]) -> None:
    """Of every input channel: (largest weight)^(1 - α) / (largest input)^α; modelopt's bound is 10⁴."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    torch.manual_seed(0)
    layers = nn.ModuleDict({"linear": nn.Linear(16, 32), "convolution": nn.Conv2d(16, 16, 3, padding=1)})
    x = torch.randn(64, 16) * torch.logspace(-2, 2, 16)
    x[:, 3] = 0
    weight = layers["linear"].weight.abs().amax(0)

    def draw() -> None:
        print("drawing")
        layers["linear"](x)
        layers["convolution"](torch.ones(1, 16, 4, 4))

    inputs, smoothing = calibrate(layers, INT8, draw)
    assert capsys.readouterr().out == "drawing\n"
    expected = weight ** (1 - INT8.smoothing) / x.abs().amax(0) ** INT8.smoothing
    expected[3] = 1e4
    assert smoothing.keys() == {"linear"} and smoothing["linear"] == pytest.approx(expected.tolist(), rel=1e-4)
    largest = {"linear": float((x * expected).abs().max()), "convolution": 1.0}
    assert inputs == pytest.approx({name: value / 127 for name, value in largest.items()}, rel=1e-4)


@torch.no_grad()
def test_a_quantized_denoiser_is_near_and_one_with_wrong_scales_is_not(
    checkpoint: Checkpoint, inputs: tuple[torch.Tensor, ...], scales: Scales
) -> None:
    expected = _denoiser(checkpoint)(*inputs)

    def error(used: Scales) -> float:
        denoiser = _denoiser(checkpoint)
        used.apply(denoiser)
        assert sum(isinstance(part, QuantizedLayer) for part in denoiser.modules()) == len(scales.inputs)
        return float((denoiser(*inputs) - expected).norm() / expected.norm())

    near = error(scales)
    assert 0 < near < 0.15
    assert error(replace(scales, inputs={name: scale / 64 for name, scale in scales.inputs.items()})) > 3 * near


def test_kept_layers_stay(checkpoint: Checkpoint) -> None:
    layers = FP8.layers(_denoiser(checkpoint))
    assert not any(
        word in name
        for name in layers
        for word in ("conv_in", "conv_out", "time_emb", "shortcut", "up_blocks.2.resnets.2")
    )
    assert {"proj_in", "to_q", "to_out", "conv1", "conv2"} <= {name.rpartition(".")[2] for name in layers}
    assert FP8.layers(nn.ModuleDict({"odd": nn.Linear(24, 16), "one": nn.Conv2d(16, 16, 1)})) == {}


def test_scales_are_read_back(scales: Scales, tmp_path: Path) -> None:
    scales.save(tmp_path)
    found = Scales.load(tmp_path, MODEL)
    assert found == scales and found.key == scales.key and len(found.key) == 32
    name = next(iter(scales.inputs))
    others = (
        replace(scales, model="another"),
        replace(scales, recipe=Recipe()),
        replace(scales, inputs={**scales.inputs, name: scales.inputs[name] * (1 + 1e-12)}),
        replace(scales, smoothing={**scales.smoothing, name: (1.0,)}),
    )
    assert len({scales.key, *(other.key for other in others)}) == 5


@pytest.mark.parametrize(("scale", "told"), [(0.0, "0"), (math.inf, "inf"), (math.nan, "nan"), (-1.0, "-1")])
def test_a_scale_that_cannot_be_used_is_told(scale: float, told: str) -> None:
    with pytest.raises(InputError) as raised:
        Scales(FP8, MODEL, {"good": 1.0, "mid_block.layer": scale})
    assert str(raised.value) == f"the scale of mid_block.layer is {told}; expected a finite number over 0"
    with pytest.raises(InputError) as raised:
        Scales(INT8, MODEL, {"layer": 1.0}, {"layer": (1.0, scale)})
    assert str(raised.value) == f"the smoothing factor of layer is {told}; expected a finite number over 0"


def test_scales_of_another_model_or_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^the scales in {tmp_path} can't be read: .*{RECIPE_NAME}"):
        Scales.load(tmp_path, MODEL)
    Scales(FP8, MODEL, {"layer": 1.0}).save(tmp_path)
    with pytest.raises(InputError) as raised:
        Scales.load(tmp_path, "fedcba9876543210")
    assert str(raised.value) == f"the scales in {tmp_path} are of model 01234567; expected model fedcba98"
    others = Scales(FP8, MODEL, {"layer": 1.0 + 1e-15})
    (tmp_path / "others").mkdir()
    others.save(tmp_path / "others")
    (tmp_path / SCALES_NAME).write_bytes((tmp_path / "others" / SCALES_NAME).read_bytes())
    with pytest.raises(InputError, match=rf"^the scales in {tmp_path} are damaged; build again$"):
        Scales.load(tmp_path, MODEL)
    (tmp_path / SCALES_NAME).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=rf"^the scales in {tmp_path} can't be read: "):
        Scales.load(tmp_path, MODEL)


def test_layers_and_scales_have_to_be_the_same() -> None:
    layers = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    with pytest.raises(InputError) as raised:
        Scales(FP8, MODEL, {"first": 1.0}).apply(layers)
    assert str(raised.value) == "layer second has no scale; calibrate this model again"
    with pytest.raises(InputError) as raised:
        Scales(FP8, MODEL, {"first": 1.0, "second": 1.0, "third": 1.0}).apply(layers)
    assert str(raised.value) == "there is a scale of third, but no layer; calibrate this model again"
    assert not any(isinstance(part, QuantizedLayer) for part in layers.modules())


def test_a_layer_has_as_many_smoothing_factors_as_input_channels() -> None:
    layers = nn.ModuleDict({"linear": nn.Linear(16, 16), "convolution": nn.Conv2d(16, 16, 3, padding=1)})
    inputs, right = {"linear": 1.0, "convolution": 1.0}, (1.0,) * 16
    for recipe, smoothing, told in (
        (INT8, {}, "layer linear has 0 smoothing factors; expected 16"),
        (INT8, {"linear": right[1:]}, "layer linear has 15 smoothing factors; expected 16"),
        (INT8, {"linear": right, "convolution": right}, "layer convolution has 16 smoothing factors; expected 0"),
        (FP8, {"linear": right}, "layer linear has 16 smoothing factors; expected 0"),
        (INT8, {"linear": right, "other": right}, "there is a scale of other, but no layer"),
    ):
        with pytest.raises(InputError) as raised:
            Scales(recipe, MODEL, inputs, smoothing).apply(layers)
        assert str(raised.value) == f"{told}; calibrate this model again"
    assert not any(isinstance(part, QuantizedLayer) for part in layers.modules())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_layer_that_was_never_called_is_told(recipe: Recipe) -> None:
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt")
    layers = nn.ModuleDict({"called": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    with pytest.raises(InputError, match="^other was never called in calibration; draw with all parts of the model$"):
        calibrate(layers, recipe, lambda: layers["called"](torch.ones(2, 16)))
