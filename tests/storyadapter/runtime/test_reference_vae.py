"""Iterations whose pictures only become references, decoded by a tiny VAE, and the last one as ever."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from storyadapter import Checkpoint, FrameFinished, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import RunError
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.pipeline import FinishedIteration
from tests.oracle.comparison import errors_of_frames
from tests.reference_vaes import write_reference_vae
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.spoil import edit_tensors, tiny_paths
from tests.storyadapter.runtime.replaced import counting, with_networks

FP32 = Numerics("fp32")
PLAN = RunPlan(height=64, width=64, seed=3, steps=2, scales=(0.4, 0.5))
STORY = Story(("a fox", "an owl", "the sea"), style="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference_vae(tmp_path_factory.mktemp("vae") / "tiny")


def pipeline_of(model: Path, numerics: Numerics = FP32, **paths: Path) -> StoryPipeline:
    checkpoint = Checkpoint.open(tiny_paths(model, **paths))
    networks = open_networks(checkpoint, numerics=numerics)
    return StoryPipeline(networks, checkpoint.load_tokenizers(), model="m")


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path, folder: Path) -> StoryPipeline:
    return pipeline_of(tiny_model_dir, reference_vae=folder)


def draw(pipeline: StoryPipeline, plan: RunPlan = PLAN, **how: object) -> list[list[FrameFinished]]:
    drawn = [event for event in pipeline.run(STORY, plan, **how) if isinstance(event, FrameFinished)]
    frames = [[event for event in drawn if event.iteration == index] for index in range(plan.iterations)]
    return [sorted(of_one, key=lambda event: event.frame) for of_one in frames]


def pictures(frames: list[FrameFinished]) -> list[Image.Image]:
    return [frame.picture for frame in frames]


def test_a_story_is_drawn_as_if_each_decoder_had_drawn_its_part(pipeline: StoryPipeline) -> None:
    """All by the tiny decoder in place of the VAE, and then the last iteration gone on with by the VAE."""
    networks, counts = counting(pipeline.networks, "vae_decoder", "reference_decoder")
    tokenizers = (pipeline.tokenizers.first, pipeline.tokenizers.second)
    found = draw(StoryPipeline(networks, tokenizers))
    assert (counts["reference_decoder rows"], counts["vae_decoder rows"]) == (6, 3)
    without = replace(pipeline.networks, geometry=replace(pipeline.networks.geometry, reference_vae=False))
    plain = StoryPipeline(without, tokenizers)
    tiny = StoryPipeline(with_networks(without, vae_decoder=without["reference_decoder"]), tokenizers)
    expected = draw(tiny)
    for iteration in (0, 1):
        assert errors_of_frames(pictures(found[iteration]), pictures(expected[iteration])) == [0] * 3
    last = draw(plain, resume=FinishedIteration(1, pictures(expected[1])))[2]
    assert max(errors_of_frames(pictures(found[2]), pictures(last))) < 0.01
    # a reference left out, or decoded by the VAE, is another story; so is a last iteration by the tiny decoder
    for other in (draw(plain)[2], expected[2]):
        assert min(errors_of_frames(pictures(found[2]), pictures(other))) > 5


def test_keys_say_which_decoder_drew_a_frame(pipeline: StoryPipeline, tiny_model_dir: Path) -> None:
    keys = [[frame.key for frame in frames] for frames in draw(pipeline)]
    fewer = [[frame.key for frame in frames] for frames in draw(pipeline, replace(PLAN, scales=(0.4,)))]
    assert fewer[0] == keys[0] and not {*fewer[1]} & {*keys[1]}
    (alone,) = draw(pipeline, replace(PLAN, scales=()))
    (as_ever,) = draw(pipeline_of(tiny_model_dir), replace(PLAN, scales=()))
    assert [frame.key for frame in alone] == [frame.key for frame in as_ever]  # the VAE drew both
    assert not {frame.key for frame in alone} & {*keys[0]}


def test_its_frames_are_decoded_again_too_where_half_precision_overflows(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = write_reference_vae(tmp_path / "tiny")

    def grow(tensors: dict[str, Tensor]) -> None:  # between its first layer and its last; ReLU passes factors on
        for name in ("0.weight", "0.bias"):
            tensors[f"decoder.layers.{name}"] *= 5e4
        tensors["decoder.layers.12.weight"] /= 5e4

    edit_tensors(folder / "diffusion_pytorch_model.safetensors", grow)
    plan = replace(PLAN, scales=(0.4,))
    expected = draw(pipeline_of(tiny_model_dir, reference_vae=folder), plan)
    half = pipeline_of(tiny_model_dir, Numerics.of("fp32", reference_decoder="fp16"), reference_vae=folder)
    found = draw(half, plan)
    assert [[frame.decoded_again for frame in frames] for frames in found] == [[True] * 3, [False] * 3]
    for mine, theirs in zip(found, expected, strict=True):
        assert max(errors_of_frames(pictures(mine), pictures(theirs))) < 0.01
    half.networks = replace(half.networks, load_fp32=None)
    with raises_typed(RunError, "frame 0: the reference VAE gave values that are not finite in fp16, "):
        draw(half, plan)
