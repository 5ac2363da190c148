"""The decoder by itself: parts, order, embeddings, frames that aren't finite."""

import time
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from storyadapter import Checkpoint
from storyadapter.engine import open_networks
from storyadapter.method.errors import RunError
from storyadapter.model.networks import Networks
from storyadapter.runtime.clock import StageClock
from storyadapter.runtime.decoding import FrameDecoder
from storyadapter.runtime.pictures import embed_pictures


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint) -> Networks:
    return open_networks(checkpoint)


@pytest.fixture(params=[False, True], ids=["in sequence", "overlapped"])
def decoder(networks: Networks, request: pytest.FixtureRequest) -> Iterator[FrameDecoder]:
    decoder = FrameDecoder(networks, chunk=2, overlapped=request.param)
    yield decoder
    decoder.close()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(5, 4, 8, 8, generator=torch.manual_seed(0))


def told(decoder: FrameDecoder) -> Iterator[tuple[int, Image.Image]]:
    """Every frame, as soon as it is finished."""
    while decoder.batches:
        yield from decoder.finished()
        time.sleep(0.001)


def test_frames_come_in_order_with_their_embeddings(
    networks: Networks, decoder: FrameDecoder, latents: torch.Tensor
) -> None:
    clock = StageClock(networks.device)
    for frames in (range(0, 3), range(3, 5)):
        assert not decoder.submit(1, frames, latents[frames.start : frames.stop], clock, embed=decoder.overlapped)
    drawn = list(told(decoder))
    assert [frame for frame, _ in drawn] == [0, 1, 2, 3, 4]
    assert list(clock.seconds()) == ["decode"]
    pictures = [picture for _, picture in drawn]
    assert all((picture.mode, picture.size) == ("RGB", (64, 64)) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 5
    if decoder.overlapped:
        batches = (range(0, 3), range(3, 5))
        assert torch.equal(decoder.take_embeddings(), embed_pictures(networks, pictures, batches))


def test_a_picture_is_rounded_as_diffusers_rounds(networks: Networks, latents: torch.Tensor) -> None:
    decoder = FrameDecoder(networks, chunk=None, overlapped=False)
    decoder.submit(0, range(5), latents, StageClock(networks.device), embed=False)
    with torch.inference_mode():
        image = networks["vae_decoder"]({"latents": latents})["image"]
    expected = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    for frame, picture in told(decoder):
        assert picture.tobytes() == expected[frame].tobytes()


def test_a_frame_that_is_not_finite_is_told_after_those_before_it(
    networks: Networks, decoder: FrameDecoder, latents: torch.Tensor
) -> None:
    latents[3, 0, 0, 0] = torch.nan
    decoder.submit(2, range(10, 15), latents, StageClock(networks.device), embed=False)
    frames = []
    with pytest.raises(RunError, match="^iteration 2, frame 13: the UNet gave values that are not finite in fp32"):
        for frame, _ in told(decoder):
            frames.append(frame)
    assert frames == [10, 11, 12]


def test_what_is_given_up_leaves_nothing(networks: Networks, latents: torch.Tensor) -> None:
    decoder = FrameDecoder(networks, chunk=1, overlapped=True)
    decoder.submit(0, range(5), latents, StageClock(networks.device), embed=True)
    decoder.close()
    decoder.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        decoder.submit(0, range(5), latents, StageClock(networks.device), embed=True)


class NoRoomFor(torch.utils._python_dispatch.TorchDispatchMode):
    """Memory runs out in the first calls of an operator."""

    def __init__(self, operator: torch._ops.OpOverload, times: int) -> None:
        super().__init__()
        self.operator, self.times = operator, times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("no room")
        return func(*args, **(kwargs or {}))


def test_embeddings_that_do_not_fit_together_are_still_there_when_there_is_room(
    networks: Networks, latents: torch.Tensor
) -> None:
    decoder = FrameDecoder(networks, chunk=2, overlapped=True)
    for frames in (range(0, 3), range(3, 5)):
        decoder.submit(1, frames, latents[frames.start : frames.stop], StageClock(networks.device), embed=True)
    pictures = [picture for _, picture in told(decoder)]
    with NoRoomFor(torch.ops.aten.cat.default, times=1) as memory:
        with pytest.raises(torch.OutOfMemoryError):
            decoder.take_embeddings()
        assert memory.times == 0
        embeddings = decoder.take_embeddings()
    assert torch.equal(embeddings, embed_pictures(networks, pictures, (range(0, 3), range(3, 5))))
    decoder.close()
