"""One run of one story: its micro-batches, iteration by iteration.

The host puts all steps of a micro-batch on the stream and goes on; what the device has finished, it learns from events.
At most two micro-batches are on their way: while one is decoded, the next is denoised.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from storyadapter.method.events import (
    Event,
    FrameFinished,
    IterationFinished,
    IterationStarted,
    MicroBatchHalved,
    StepFinished,
)
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.model.networks import Networks
from storyadapter.runtime.clock import DeviceMarks, StageClock
from storyadapter.runtime.conditioning import StoryText
from storyadapter.runtime.decoding import POLL_SECONDS, FrameDecoder
from storyadapter.runtime.denoising import LoopBuffers, LoopInputs
from storyadapter.runtime.memory import release_memory
from storyadapter.runtime.pictures import embed_pictures
from storyadapter.runtime.reference_bank import ReferenceBank

Result = TypeVar("Result")


class StoryRun:
    """What one run holds: its text, its decoder, and how far it has come.

    Args:
        networks: of the pipeline.
        buffers: of the pipeline.
        plan: every setting.
        frames: N.
        loop: the sampler and its noise, on the device.
        text: the prompts.
        decoder: closed by the caller.
        max_frames: frames of a micro-batch at the most; halved where the memory doesn't suffice.
        clock: of the whole run; counts "text".
    """

    def __init__(
        self,
        networks: Networks,
        buffers: LoopBuffers,
        plan: RunPlan,
        frames: int,
        loop: LoopInputs,
        text: StoryText,
        decoder: FrameDecoder,
        max_frames: int,
        clock: StageClock,
    ) -> None:
        self.max_frames = max_frames
        self._networks = networks
        self._buffers = buffers
        self._plan = plan
        self._frames = frames
        self._loop = loop
        self._text = text
        self._decoder = decoder
        self._clock = clock
        self._marks: DeviceMarks[StepFinished] = DeviceMarks(networks.device)
        # room for what later iterations need, so that all of them replay the same graphs
        self._room = frames if plan.scales and networks.padding_is_free else 1

    def iterate(self, first: int, pictures: Sequence[Image.Image]) -> Iterator[Event]:
        """All iterations from `first` on; `pictures` are those of the one before, empty if there is none."""
        given = list(pictures)
        for iteration in range(first, self._plan.iterations):
            clock = StageClock(self._networks.device)
            references, given = given, []
            batches: list[range] = []
            scale = self._plan.scale_of(iteration)
            yield IterationStarted(iteration, scale)
            room = self._room if scale is None else self._frames
            bank = self._with_room(partial(self._buffers.take_bank, room))
            with torch.inference_mode(), clock.stage("references"):
                if scale is None:
                    bank.clear()
                else:
                    if self._decoder.overlapped and iteration > first:
                        embed = self._decoder.take_embeddings
                    else:
                        groups = split_evenly(self._frames, self.max_frames) if self._decoder.overlapped else None
                        embed = partial(embed_pictures, self._networks, references, groups)
                    embeddings = self._with_room(embed)
                    self._with_room(partial(bank.fill, self._networks, embeddings, scale))
            for event in self._iteration(iteration, bank, clock, batches):
                if isinstance(event, FrameFinished) and not self._decoder.overlapped:
                    given.append(event.picture)
                yield event
            self._buffers.give_bank(room, bank)
            yield IterationFinished(iteration, clock.seconds(), tuple(batches))

    def _iteration(self, iteration: int, bank: ReferenceBank, clock: StageClock, drawn: list[range]) -> Iterator[Event]:
        """Every frame of an iteration; the micro-batches that were drawn are put into `drawn`."""
        waiting = deque(split_evenly(self._frames, self.max_frames))
        alone = False  # whether all that is kept for speed was given back just before
        while waiting:
            batch = waiting.popleft()
            start, roomy = batch.start, False  # of what is left of it, and whether there was memory for it
            try:
                latents = yield from self._denoise(iteration, batch, bank, clock)
            except torch.OutOfMemoryError:
                if alone:
                    raise
            else:
                roomy = yield from self._decode(iteration, batch, latents, clock)
                drawn.append(batch)
                start = batch.stop
                del latents
            alone = False
            if start == batch.stop and (roomy or len(batch) == 1):
                continue
            yield from self._drain(iteration)
            self._release()
            if len(batch) == 1:
                alone = True
                waiting.appendleft(batch)
                continue
            self.max_frames = -(-len(batch) // 2)
            yield MicroBatchHalved(iteration, batch, self.max_frames)
            rest = split_evenly(self._frames - start, self.max_frames) if start < self._frames else ()
            waiting = deque(range(start + part.start, start + part.stop) for part in rest)
        yield from self._drain(iteration)

    def _denoise(
        self, iteration: int, batch: range, bank: ReferenceBank, clock: StageClock
    ) -> Generator[Event, None, Tensor]:
        """Put all steps of a micro-batch on the stream, and tell meanwhile what the device has finished.

        Returns:
            Its latents, [F, 4, h, w] fp32.

        Raises:
            torch.OutOfMemoryError: the memory doesn't suffice; nothing of it was submitted then.
        """
        with torch.inference_mode():
            with self._clock.stage("text"):
                bound = self._text.bind(batch)
            with clock.stage("denoise"):
                state = self._buffers.take_state(self._loop.shape(len(batch)))
                state.load(self._loop, bound, bank)
        del bound
        for call in range(1, self._loop.calls + 1):
            with torch.inference_mode(), clock.stage("denoise"):
                state.advance()
            self._marks.put(StepFinished(iteration, batch, call, self._loop.calls))
            yield from self._news(iteration)
        with torch.inference_mode():
            latents = state.x.clone()
        self._buffers.give_state(state)
        return latents

    def _decode(self, iteration: int, batch: range, latents: Tensor, clock: StageClock) -> Generator[Event, None, bool]:
        """Submit a micro-batch to the decoder; tell what is finished until only one is on its way.

        Returns:
            Whether the memory sufficed to decode it beside other work.

        Raises:
            torch.OutOfMemoryError: it didn't suffice for a single frame alone. Fewer frames at once wouldn't help, and
                some of these may have been told.
        """
        embed = self._decoder.overlapped and iteration + 1 < self._plan.iterations
        rest = self._decoder.submit(iteration, batch, latents, clock, embed=embed)
        if rest:
            yield from self._drain(iteration)
            self._release()
            left = latents[rest.start - batch.start :]
            if self._decoder.submit(iteration, rest, left, clock, embed=embed):
                raise torch.OutOfMemoryError("a single frame can't be decoded")
        yield from self._wait(iteration, batches=1)
        return not rest

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """Do work between micro-batches; where the memory doesn't suffice, once more without what is kept for speed."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self._release()
            return work()

    def _release(self) -> None:
        self._text.forget()
        release_memory(self._networks, self._buffers)

    def _news(self, iteration: int) -> Iterator[Event]:
        """What was finished since it was last asked for."""
        frames = list(self._decoder.finished())  # asked for first: no frame is told before its steps
        yield from self._marks.passed()
        for frame, picture in frames:
            yield FrameFinished(iteration, frame, self._plan.scale_of(iteration), picture)

    def _wait(self, iteration: int, batches: int) -> Iterator[Event]:
        """News until at most so many micro-batches have frames that aren't finished."""
        yield from self._news(iteration)
        while self._decoder.batches > batches:
            time.sleep(POLL_SECONDS)
            yield from self._news(iteration)

    def _drain(self, iteration: int) -> Iterator[Event]:
        """News until nothing is on its way."""
        yield from self._wait(iteration, batches=0)
        while len(self._marks):
            time.sleep(POLL_SECONDS)
            yield from self._news(iteration)
