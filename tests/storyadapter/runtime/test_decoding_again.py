"""Frames whose pictures aren't finite in half precision while their latents are: they are decoded again in fp32."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyadapter import Checkpoint, FrameFinished, IterationFinished, RunPlan, Story
from storyadapter.api import open_checkpoint
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import CheckpointError, RunError
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.clock import StageClock
from storyadapter.runtime.decoding import Decoded, FrameDecoder
from storyadapter.runtime.pipeline import StoryPipeline
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.spoil import edit_tensors, tiny_paths
from tests.storyadapter.runtime.replaced import ShortOfMemory, counting, with_networks
from tests.storyadapter.runtime.test_decoding import tasks, told

HALF = Numerics.of("fp32", vae_decoder="fp16")
PLAN = RunPlan(height=64, width=64, seed=3, steps=1, scales=(0.4,))
STORY = Story(("a fox", "an owl", "the sea"), style="none")


def scaled(folder: Path, to: Path, factor: float) -> Path:
    """The model with a VAE whose first convolution gives so many times as much; what follows is normalized."""
    shutil.copytree(folder, to)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("weight", "bias"):
            tensors[f"decoder.conv_in.{name}"] *= factor

    edit_tensors(to / "vae/diffusion_pytorch_model.safetensors", change)
    return to


@pytest.fixture(scope="module")
def sometimes(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose VAE overflows fp16 for latents far from 0 alone."""
    return scaled(tiny_model_dir, tmp_path_factory.mktemp("model") / "sometimes", 500)


@pytest.fixture(scope="module")
def always(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scaled(tiny_model_dir, tmp_path_factory.mktemp("model") / "always", 30_000)


@pytest.fixture
def latents() -> Tensor:
    latents = torch.randn(5, 4, 8, 8, generator=torch.manual_seed(0))
    latents[3] *= 30
    return latents


def opened(folder: Path, numerics: Numerics = HALF) -> Networks:
    return open_networks(Checkpoint.open(tiny_paths(folder)), numerics=numerics)


def decoded(networks: Networks, latents: Tensor, *, embed: bool = False, overlapped: bool = False) -> list[Decoded]:
    decoder = FrameDecoder(networks, overlapped=overlapped)
    decoder.submit(tasks(range(len(latents)), embed=embed), latents, StageClock(networks.device), None)
    found = list(told(decoder))
    decoder.close()
    return found


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("embed", [False, True])
def test_a_frame_is_decoded_again_and_its_mates_are_as_ever(
    sometimes: Path, latents: Tensor, embed: bool, overlapped: bool
) -> None:
    networks = opened(sometimes)
    found = decoded(networks, latents, embed=embed, overlapped=overlapped)
    assert [(one.task.frame, one.again) for one in found] == [(frame, frame == 3) for frame in range(5)]
    without = decoded(replace(networks, load_fp32=None), latents)
    assert [one.not_finite for one in without] == [None] * 3 + ["vae_decoder", None]
    mates = [0, 1, 2, 4]
    assert [found[frame].picture.tobytes() for frame in mates] == [without[frame].picture.tobytes() for frame in mates]
    (exact,) = decoded(opened(sometimes, Numerics("fp32")), latents[3:4])
    assert found[3].picture.tobytes() == exact.picture.tobytes()
    assert all((one.embedding is not None) == embed for one in found)


def test_fp32_is_loaded_only_where_it_is_needed_and_once(sometimes: Path, latents: Tensor) -> None:
    networks = opened(sometimes)
    loaded = list[Networks]()

    def load(name: str) -> Networks:
        loaded.append(networks.load_fp32(name))
        return loaded[-1]

    noted = replace(networks, load_fp32=load)
    assert not any(one.again for one in decoded(noted, latents[:3])) and not loaded
    latents[1] *= 30
    assert [one.again for one in decoded(noted, latents)] == [False, True, False, True, False]
    (only,) = loaded
    assert list(only.by_name) == ["vae_decoder"] and only.dtype("vae_decoder") == torch.float32


def test_what_is_not_finite_in_fp32_either_is_not_decoded_a_third_time(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = scaled(tiny_model_dir, tmp_path / "model", 1e38)
    networks, counts = counting(opened(folder), "vae_decoder")
    pipeline = StoryPipeline(networks, Checkpoint.open(tiny_paths(folder)).load_tokenizers())
    # the weight itself is finite in its file
    line = "iteration 0, frame 0: the VAE gave values that are not finite in fp16, nor in fp32, though its weights are$"
    with raises_typed(RunError, line):
        list(pipeline.run(STORY, PLAN))
    assert counts["vae_decoder"] == 1


def test_latents_that_are_not_finite_are_not_decoded_again(sometimes: Path, latents: Tensor) -> None:
    latents[3, 0, 0, 0] = torch.inf
    found = decoded(replace(opened(sometimes), load_fp32=None), latents)
    assert [one.not_finite for one in decoded(opened(sometimes), latents)] == [one.not_finite for one in found]
    assert found[3].not_finite == "denoiser"


def test_in_fp32_nothing_is_finer(tiny_model_dir: Path, tmp_path: Path, latents: Tensor) -> None:
    folder = scaled(tiny_model_dir, tmp_path / "model", 1e38)
    loaded = list[str]()
    networks = replace(opened(folder, Numerics("fp32")), load_fp32=loaded.append)
    assert {one.not_finite for one in decoded(networks, latents)} == {"vae_decoder"} and not loaded


def drawn(pipeline: StoryPipeline) -> tuple[dict[tuple[int, int], np.ndarray], list[tuple[int, ...]]]:
    """Every picture, and the frames of every iteration that were decoded again."""
    events = list(pipeline.run(STORY, PLAN))
    frames = [event for event in events if isinstance(event, FrameFinished)]
    again = [event.decoded_again for event in events if isinstance(event, IterationFinished)]
    told = [tuple(e.frame for e in frames if e.iteration == index and e.decoded_again) for index in range(len(again))]
    assert told == again
    return {(event.iteration, event.frame): np.asarray(event.picture, float) for event in frames}, again


def test_a_story_is_drawn_as_with_a_vae_in_fp32(always: Path) -> None:
    checkpoint = Checkpoint.open(tiny_paths(always))
    pipeline = open_checkpoint(checkpoint, backend="eager", numerics=HALF)
    pictures, again = drawn(pipeline)
    assert again == [(0, 1, 2), (0, 1, 2)]
    expected, none = drawn(open_checkpoint(checkpoint, backend="eager", numerics=Numerics("fp32")))
    assert none == [(), ()]
    assert max(abs(pictures[place] - expected[place]).max() for place in expected) <= 1
    pipeline.networks = replace(pipeline.networks, load_fp32=None)
    with raises_typed(RunError, "frame 0: the VAE gave values that are not finite in fp16, .*--vae-precision bf16 or"):
        drawn(pipeline)


def test_a_vae_that_was_changed_meanwhile_is_not_used(always: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(always, tmp_path / "model"))
    pipeline = open_checkpoint(Checkpoint.open(tiny_paths(folder)), backend="eager", numerics=HALF)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)
    with raises_typed(CheckpointError, "^a file of .*model was changed while it was in use$"):
        drawn(pipeline)


class Short:
    """Loads a VAE in fp32 for whose first `times` calls there is no memory."""

    def __init__(self, networks: Networks, times: int) -> None:
        self.load, self.loaded = networks.load_fp32, 0
        self.short = ShortOfMemory(networks["vae_decoder"], times)

    def __call__(self, name: str) -> Networks:
        self.loaded += 1
        networks = self.load(name)
        self.short = ShortOfMemory(networks[name], self.short.times)
        return with_networks(networks, **{name: self.short})


def test_without_memory_a_frame_waits_until_nothing_else_goes_on(sometimes: Path, latents: Tensor) -> None:
    networks = opened(sometimes)
    short = Short(networks, 2)
    decoder = FrameDecoder(replace(networks, load_fp32=short), overlapped=False)
    decoder.submit(tasks(range(5)), latents, StageClock(networks.device), None)
    assert [one.task.frame for one in decoder.finished()] == [0, 1, 2] and decoder.starved
    assert list(decoder.finished()) == [] and short.short.times == 1  # not tried again beside other work
    with pytest.raises(torch.OutOfMemoryError):
        list(decoder.finished(alone=True))
    decoder.forget()
    assert [(one.task.frame, one.again) for one in decoder.finished(alone=True)] == [(3, True), (4, False)]
    assert short.loaded == 2 and not decoder.starved and not decoder.batches


@pytest.mark.parametrize(("times", "enough"), [(2, True), (3, False)])
def test_a_story_for_which_there_is_no_memory(always: Path, times: int, enough: bool) -> None:
    pipeline = open_checkpoint(Checkpoint.open(tiny_paths(always)), backend="eager", numerics=HALF)
    pipeline.networks = replace(pipeline.networks, load_fp32=Short(pipeline.networks, times))
    if enough:
        assert drawn(pipeline)[1] == [(0, 1, 2), (0, 1, 2)]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            drawn(pipeline)
