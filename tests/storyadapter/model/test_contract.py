"""The contract: letters, ranges, and the messages of what doesn't fit."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.bench.synthetic import SDXL as FULL_SIZE
from storyadapter.method.errors import InputError
from storyadapter.model.contract import (
    ControlGeometry,
    Geometry,
    LayerWidth,
    NetworkSpec,
    Range,
    Residual,
    ShapeRanges,
    network_specs,
    size_of,
)
from storyadapter.model.numerics import DTYPE_NAMES, PRECISIONS, Numerics, Precision
from tests.refusals import raises_typed

SDXL = FULL_SIZE.geometry
PIXELS = Range(1024, 1024)


def shapes_of(spec: NetworkSpec, letters: dict[str, int]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(size_of(dim, letters) for dim in tensor.shape) for tensor in spec.inputs}


def test_denoiser_inputs_are_those_of_the_design() -> None:
    inputs = {tensor.name: (tensor.shape, tensor.dtype) for tensor in network_specs(SDXL)["denoiser"].inputs}
    assert list(inputs.items()) == [
        ("latents", (("B", 4, "h", "w"), "network")),
        ("timestep", (("B",), "float32")),
        ("added_embedding", (("B", 1280), "network")),
        ("text_kv_640", ((10, "P", 2, "77*M", 640), "network")),
        ("text_kv_1280", ((60, "P", 2, "77*M", 1280), "network")),
        ("text_row", (("B",), "int32")),
        ("ref_kv_640", ((10, "G", 2, "R", 640), "network")),
        ("ref_kv_1280", ((60, "G", 2, "R", 1280), "network")),
        ("ref_row", (("B",), "int32")),
        ("ref_length", (("G",), "int32")),
    ]


def test_a_model_with_controlnets_has_networks_for_each_and_takes_their_residuals() -> None:
    plain = network_specs(SDXL)
    residuals = tuple(Residual(*sizes) for sizes in ((320, 1), (640, 2), (1280, 4)))
    control = ControlGeometry((LayerWidth(640, 4, 10), LayerWidth(1280, 30, 20)), 1280, residuals)
    geometry = replace(SDXL, controls=(control, replace(control, widths=())))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.as_dict()))) == geometry
    specs = network_specs(geometry)
    assert {name: spec for name, spec in specs.items() if name in plain and name != "denoiser"} == {
        name: spec for name, spec in plain.items() if name != "denoiser"
    }
    added = specs["denoiser"].inputs[len(plain["denoiser"].inputs) :]
    assert [tensor.shape for tensor in added] == [
        ("B", "h", "w", 320),
        ("B", "h/2", "w/2", 640),
        ("B", "h/4", "w/4", 1280),
    ]
    for index in range(2):
        assert specs[f"controlnet_{index}"].outputs == added
        made = specs[f"control_embedding_{index}"].outputs + specs[f"control_projection_{index}"].outputs
        inputs = {tensor.name for tensor in specs[f"controlnet_{index}"].inputs}
        beside = {"latents", "timestep", "conditioning_scale", *(("text_row",) if not index else ())}
        assert inputs == {tensor.name for tensor in made} | beside
    letters = {"B": 2, "P": 2, "G": 1, "R": 4, "M": 1, "h": 8, "w": 16}
    assert shapes_of(specs["denoiser"], letters)["residual_1"] == (2, 4, 8, 640)
    assert specs["denoiser"].check_shapes(shapes_of(specs["denoiser"], letters), None) == letters
    wrong = shapes_of(specs["denoiser"], letters) | {"residual_1": (2, 5, 8, 640)}
    with pytest.raises(ValueError, match="denoiser: input residual_1 has h/2 = 5; expected 4, as in an earlier input"):
        specs["denoiser"].check_shapes(wrong, None)


def test_network_outputs_feed_the_inputs_of_the_next() -> None:
    specs = network_specs(SDXL)
    made = {tensor.name: tensor for spec in specs.values() for tensor in spec.outputs}
    assert made["pooled_text"] in specs["text_projection"].inputs
    taken = {tensor.name: tensor for tensor in specs["text_projection"].inputs}
    for name in ("text_embedding", "text_embedding_2"):  # chunk by chunk, and all chunks of a prompt
        prompts, tokens, width = made[name].shape
        assert taken[name].shape == (prompts, f"{tokens}*M", width)
    denoiser = {tensor.name: tensor for tensor in specs["denoiser"].inputs}
    for width in SDXL.widths:
        assert made[f"text_kv_{width.channels}"] == denoiser[f"text_kv_{width.channels}"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("vae_precision", PRECISIONS)
def test_only_the_vae_has_the_vaes_precision(precision: Precision, vae_precision: Precision) -> None:
    numerics = SDXL.numerics(precision, vae_precision)
    for name, spec in network_specs(SDXL).items():
        own = DTYPE_NAMES[vae_precision if name == "vae_decoder" else precision]
        dtypes = {tensor.dtype_name(numerics[name]) for tensor in (*spec.inputs, *spec.outputs)}
        assert own in dtypes and dtypes <= {own, "float32", "int32"}
        assert name != "vae_decoder" or dtypes == {own}


def test_the_vae_has_the_engines_precision_unless_the_checkpoint_asks_for_fp32() -> None:
    for precision in PRECISIONS:
        assert replace(SDXL, vae_in_fp32=False).numerics(precision) == Numerics(precision)
        assert replace(SDXL, vae_in_fp32=True).numerics(precision)["vae_decoder"] == "fp32"


LETTERS = {"B": 4, "P": 3, "G": 2, "R": 64, "M": 1, "h": 128, "w": 96}


def test_letters_are_read_off_the_shapes() -> None:
    spec = network_specs(SDXL)["denoiser"]
    assert spec.check_shapes(shapes_of(spec, LETTERS), None) == LETTERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": (5,)}, "denoiser: input timestep has B = 5; expected 4, as in an earlier input"),
        ({"latents": (4, 4, 128)}, "denoiser: input latents has 3 dimensions [4, 4, 128]; expected ['B', 4, 'h', 'w']"),
        (
            {"latents": (4, 9, 128, 96)},
            "denoiser: input latents has 9 in dimension 1; expected 4 (['B', 4, 'h', 'w'])",
        ),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    spec = network_specs(SDXL)["denoiser"]
    with pytest.raises(ValueError) as error:
        spec.check_shapes(shapes_of(spec, LETTERS) | change, None)
    assert str(error.value) == message


def test_a_missing_and_an_unknown_input_are_named() -> None:
    spec = network_specs(SDXL)["vae_decoder"]
    with pytest.raises(ValueError, match=r"missing inputs \['latents'\], unknown inputs \['latent'\]"):
        spec.check_shapes({"latent": (1, 4, 8, 8)}, None)


@pytest.mark.parametrize(("letter", "value"), [("B", 18), ("P", 17), ("R", 404), ("h", 132)])
def test_a_letter_outside_the_engine_is_named_with_its_range(letter: str, value: int) -> None:
    spec = network_specs(SDXL)["denoiser"]
    ranges = ShapeRanges(8, 100, PIXELS, PIXELS).letters()
    with pytest.raises(ValueError, match=f"{letter} = {value} is outside the engine's range"):
        spec.check_shapes(shapes_of(spec, LETTERS | {"w": 128, letter: value}), ranges)


@given(st.integers(1, 64), st.integers(1, 400), st.integers(1, 64), st.integers(1, 64))
def test_ranges_survive_a_manifest_and_hold_what_they_promise(
    frames: int, references: int, low: int, more: int
) -> None:
    pixels = Range(32 * low, 32 * (low + more))
    ranges = ShapeRanges(frames, references, pixels, pixels)
    assert ShapeRanges.from_dict(ranges.as_dict()) == ranges
    letters = ranges.letters()
    assert 2 * frames in letters["B"] and 2 * frames + 1 not in letters["B"]
    assert frames + 1 in letters["P"]
    assert 4 * references in letters["R"] and 4 * references + 1 not in letters["R"]
    assert pixels.maximum // 8 in letters["h"] and letters["h"].minimum % 4 == 0


def test_ranges_cover_only_what_is_smaller_in_every_field() -> None:
    small, sizes = ShapeRanges(2, 10, PIXELS, PIXELS), Range(768, 1024)
    assert ShapeRanges(4, 10, sizes, sizes).uncovered(small) is None
    assert small.uncovered(ShapeRanges(4, 10, PIXELS, PIXELS)) == "max frames is 2, 4 asked for"
    assert small.uncovered(ShapeRanges(2, 11, PIXELS, PIXELS)) == "max references is 10, 11 asked for"
    assert small.uncovered(ShapeRanges(2, 10, sizes, PIXELS)) == "height is 1024, 768..1024 asked for"


@pytest.mark.parametrize("pixels", [16, 48, 1000])
def test_a_size_that_is_no_multiple_of_32_is_refused_with_the_nearest(pixels: int) -> None:
    with raises_typed(InputError, match=f"--height is {pixels}; expected a multiple of 32, such as"):
        ShapeRanges(1, 1, Range(pixels, pixels), PIXELS)


def test_geometry_survives_a_manifest() -> None:
    assert Geometry.from_dict(SDXL.as_dict()) == SDXL
