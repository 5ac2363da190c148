"""The decoder by itself: parts, order, embeddings, frames that aren't finite."""

import time
from collections.abc import Iterator

import pytest
import torch

from storyadapter import Checkpoint
from storyadapter.engine.opening import open_networks
from storyadapter.method.plan import RunPlan
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.clock import StageClock
from storyadapter.runtime.decoding import Decoded, FrameDecoder
from storyadapter.runtime.jobs import FrameJob, Task
from storyadapter.runtime.pictures import embed_pictures
from tests.storyadapter.runtime.replaced import ShortOfMemory, with_networks


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint) -> Networks:
    return open_networks(checkpoint)


@pytest.fixture(params=[False, True], ids=["in sequence", "overlapped"])
def decoder(networks: Networks, request: pytest.FixtureRequest) -> Iterator[FrameDecoder]:
    decoder = FrameDecoder(networks, overlapped=request.param)
    yield decoder
    decoder.close()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(5, 4, 8, 8, generator=torch.manual_seed(0))


def tasks(frames: range, iteration: int = 1, embed: bool = False) -> list[Task]:
    job = FrameJob("", Numerics("fp32"), 64, 64, "", None, None, RunPlan(height=64, width=64, seed=0).sampler_in(0), 0)
    return [Task(None, job, iteration, frame, (), embed=embed) for frame in frames]


def told(decoder: FrameDecoder) -> Iterator[Decoded]:
    """Every frame, as soon as it is finished."""
    while decoder.batches:
        yield from decoder.finished(alone=True)
        time.sleep(0.001)


@pytest.mark.parametrize("embed", [False, True])
def test_frames_come_in_order_with_their_embeddings(
    networks: Networks, decoder: FrameDecoder, latents: torch.Tensor, embed: bool
) -> None:
    clock = StageClock(networks.device)
    for frames in (range(0, 3), range(3, 5)):
        wanted = tasks(frames, embed=embed)
        assert decoder.submit(wanted, latents[frames.start : frames.stop], clock, 2) == len(frames)
    drawn = list(told(decoder))
    assert [decoded.task.frame for decoded in drawn] == [0, 1, 2, 3, 4]
    assert list(clock.seconds()) == ["decode", "references"][: 1 + embed]
    pictures = [decoded.picture for decoded in drawn]
    assert all((picture.mode, picture.size) == ("RGB", (64, 64)) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 5
    if embed:
        expected = embed_pictures(networks, pictures, (range(0, 3), range(3, 5)))
        assert torch.equal(torch.stack([decoded.embedding for decoded in drawn]), expected)
    else:
        assert all(decoded.embedding is None for decoded in drawn)


def test_a_picture_is_rounded_as_diffusers_rounds(networks: Networks, latents: torch.Tensor) -> None:
    decoder = FrameDecoder(networks, overlapped=False)
    decoder.submit(tasks(range(5)), latents, StageClock(networks.device), None)
    with torch.inference_mode():
        image = networks["vae_decoder"]({"latents": latents})["image"]
    expected = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    for decoded in told(decoder):
        assert decoded.picture.tobytes() == expected[decoded.task.frame].tobytes()


@pytest.mark.parametrize("embed", [False, True])
def test_a_frame_that_is_not_finite_is_told_after_those_before_it(
    networks: Networks, decoder: FrameDecoder, latents: torch.Tensor, embed: bool
) -> None:
    latents[3, 0, 0, 0] = torch.nan
    decoder.submit(tasks(range(10, 15), iteration=2, embed=embed), latents, StageClock(networks.device), 2)
    drawn = list(told(decoder))
    assert [decoded.task.frame for decoded in drawn] == [10, 11, 12, 13, 14]
    assert [decoded.not_finite for decoded in drawn] == [None, None, None, "denoiser", None]
    assert [decoded.embedding is not None for decoded in drawn] == [embed and frame != 3 for frame in range(5)]


def test_what_is_given_up_leaves_nothing(networks: Networks, latents: torch.Tensor) -> None:
    decoder = FrameDecoder(networks, overlapped=True)
    decoder.submit(tasks(range(5)), latents, StageClock(networks.device), 1)
    decoder.close()
    decoder.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        decoder.submit(tasks(range(5)), latents, StageClock(networks.device), 1)


def test_embeddings_for_which_there_is_no_memory_wait_until_nothing_else_goes_on(
    networks: Networks, latents: torch.Tensor
) -> None:
    short = ShortOfMemory(networks["image_encoder"], 2)
    decoder = FrameDecoder(with_networks(networks, image_encoder=short), overlapped=False)
    decoder.submit(tasks(range(5), embed=True), latents, StageClock(networks.device), None)
    assert list(decoder.finished()) == [] and decoder.starved
    assert list(decoder.finished()) == [] and short.times == 1  # not tried again beside other work
    with pytest.raises(torch.OutOfMemoryError):
        list(decoder.finished(alone=True))
    drawn = list(decoder.finished(alone=True))
    assert not decoder.starved and not decoder.batches
    expected = embed_pictures(networks, [decoded.picture for decoded in drawn])
    assert torch.equal(torch.stack([decoded.embedding for decoded in drawn]), expected)


def test_frames_for_whose_embeddings_there_is_no_memory_can_be_given_up(
    networks: Networks, latents: torch.Tensor
) -> None:
    short = ShortOfMemory(networks["image_encoder"], 1)
    decoder = FrameDecoder(with_networks(networks, image_encoder=short), overlapped=False)
    wanted = tasks(range(5), embed=True)
    decoder.submit(wanted, latents, StageClock(networks.device), None)
    with pytest.raises(torch.OutOfMemoryError):
        list(decoder.finished(alone=True))
    assert decoder.drop() == tuple(wanted)
    assert not decoder.batches and not decoder.starved
