"""What sizes a package is compiled for, and how calls of size 1 are brought to them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.bench.synthetic import SDXL
from storyadapter.engine.inductor.fusion import channels_last
from storyadapter.engine.inductor.shapes import compiled_ranges, cut, doubled, example_sizes
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.dynamic_shapes import dynamic_shapes
from storyadapter.model.examples import example_inputs
from storyadapter.model.unet import Upsample

SPECS = network_specs(replace(SDXL.geometry, controls=(SDXL.control_geometry,)))
FIXED = Range(1024, 1024)


@given(frames=st.integers(1, 40), references=st.integers(1, 200), name=st.sampled_from(sorted(SPECS)))
def test_every_size_of_the_contract_is_compiled_or_one_that_is_doubled(frames: int, references: int, name: str) -> None:
    letters = ShapeRanges(frames, references, FIXED, FIXED).letters()
    compiled = compiled_ranges(SPECS[name], letters)
    for letter, value in compiled.items():
        if name == "vae_decoder" and letter == "F":
            assert value == Range(1, 1)  # one frame at a time
            continue
        assert value.maximum == letters[letter].maximum
        # dynamic sizes start at 2; what is left below is 1 alone
        assert value.minimum >= 2 or value.minimum == value.maximum
        assert value.minimum <= letters[letter].minimum + 1
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert all(example_sizes(compiled, device)[letter] in compiled[letter] for letter in compiled)


@pytest.mark.parametrize("name", ["text_projection", "denoiser", "control_projection_0", "controlnet_0"])
def test_texts_of_one_chunk_are_compiled_with_longer_ones_and_never_doubled(name: str) -> None:
    letters = ShapeRanges(4, 8, FIXED, FIXED, 3).letters()
    ranges = compiled_ranges(SPECS[name], letters)
    assert ranges["M"] == Range(1, 3)
    (dims,) = dynamic_shapes(SPECS[name], AnyInputs(), ranges)
    texts = [(tensor, axis) for tensor, spec in enumerate(SPECS[name].inputs) for axis in range(len(spec.shape))
             if spec.shape[axis] == "77*M"]  # fmt: skip
    free = [dims[tensor][axis] for tensor, axis in texts]
    assert len(free) == 2 and free[0] is free[1] and (free[0].min, free[0].max) == (77, 231)


class AnyInputs(torch.nn.Module):
    """A module whose inputs have no names."""

    def forward(self, *tensors: torch.Tensor) -> None: ...


def test_a_convolution_compiled_for_16_rows_on_a_cpu_takes_fewer(tmp_path: Path) -> None:
    """`build` compiles for 8 frames unless told otherwise, which are 16 rows."""
    spec = SPECS["denoiser"]
    ranges = compiled_ranges(spec, ShapeRanges(8, 8, FIXED, FIXED).letters())
    rows = example_sizes(ranges, torch.device("cpu"))["B"]
    module = torch.nn.Conv2d(4, 4, 1).eval()
    example = (torch.randn(rows, 4, 8, 8),)
    dims = ({0: torch.export.Dim("B", min=ranges["B"].minimum, max=ranges["B"].maximum)},)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dims)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "convolution.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for count in (2, 15, 16):
            x = torch.randn(count, 4, 8, 8)
            torch.testing.assert_close(compiled(x), module(x))


@given(images=st.integers(1, 2), latents=st.sampled_from([1, 3]))
def test_doubled_inputs_cut_again_are_the_same(images: int, latents: int) -> None:
    spec = SPECS["reference_projection"]
    inputs = [torch.randn(images, 1280), torch.tensor([0.4])]
    larger = doubled(spec, inputs, ["N"])
    assert [tuple(value.shape) for value in larger] == [(2 * images, 1280), (1,)]
    (first, *_) = spec.outputs
    output = torch.randn(latents, 2, 4 * 2 * images, 8)
    result = cut(first, output, ["N"])
    assert torch.equal(result, output[:, :, : 4 * images])


def test_all_rows_of_a_denoiser_call_are_doubled_together() -> None:
    spec = SPECS["denoiser"]
    letters = {"B": 1, "P": 1, "G": 2, "R": 1, "M": 1, "h": 4, "w": 4}
    sizes = [
        tuple(value.shape)
        for value in doubled(spec, list(example_inputs(spec, letters, "fp32").values()), ["B", "P", "R"])
    ]
    expected = example_inputs(spec, {**letters, "B": 2, "P": 2, "R": 2}, "fp32")
    assert sizes == [tuple(value.shape) for value in expected.values()]


def test_only_convolutions_change_their_layout() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 8))
    module.stack = torch.nn.Parameter(torch.randn(3, 2, 8, 4))
    channels_last(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous() and module.stack.is_contiguous()


@pytest.mark.parametrize("frames", [1, 2])
def test_an_engine_for_one_frame_is_compiled_for_two_rows(frames: int) -> None:
    letters = ShapeRanges(frames, 1, FIXED, FIXED).letters()
    compiled = compiled_ranges(SPECS["denoiser"], letters)
    assert compiled["B"] == Range(2, 2 * frames) and compiled["P"] == Range(2, 2 * frames)
    assert compiled_ranges(SPECS["image_encoder"], letters)["F"] == Range(frames, frames)


def test_an_upsampler_is_exported_for_any_number_of_rows() -> None:
    """diffusers' own for less than 64: `build --max-frames 32` wasn't possible."""
    theirs = Upsample2D(4, use_conv=True).eval()
    ours = Upsample(theirs)
    with torch.no_grad():
        for rows in (1, 63, 64, 65):
            x = torch.randn(rows, 4, 3, 5)
            assert torch.equal(ours(x), theirs(x))
        program = torch.export.export(ours, (x[:8],), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=512)},))
        assert torch.equal(program.module()(x), theirs(x))
        with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
            torch.export.export(theirs, (x[:8],), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=512)},))
