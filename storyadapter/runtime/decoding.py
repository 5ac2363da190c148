"""Latents of batches to pictures and their CLIP embeddings: on a GPU beside the UNet's work on the next ones.

The VAE and the image encoder run on a stream of their own; the bytes of the pictures come to the host by a copy that
nobody waits for but a worker thread, which makes the Pillow picture of them and what the image encoder reads of it.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from storyadapter.method.errors import CheckpointError
from storyadapter.model.networks import Networks
from storyadapter.runtime.clock import StageClock, is_passed, recorded_event
from storyadapter.runtime.jobs import Task
from storyadapter.runtime.pictures import clip_pixels, decode_latents, embed_pixels, to_picture
from storyadapter.runtime.streams import decoding_stream

POLL_SECONDS: Final = 0.001
_WORKERS: Final = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Decoded:
    """What became of a frame: its picture and, where they were wanted, on the CPU its embedding [width] fp32 and its
    latents [4, h, w] fp16; or in which network's output values were seen that aren't finite, and the error that the
    worker makes of it. `again`: whether the picture was decoded in fp32, as the VAE's values weren't finite."""

    task: Task
    picture: Image.Image | None = None
    embedding: Tensor | None = None
    latents: Tensor | None = None
    again: bool = False
    not_finite: str | None = None
    error: BaseException | None = None


# a frame's picture, and what the image encoder reads of it and its latents where they are wanted
_Drawn: TypeAlias = tuple[Image.Image, Tensor | None, Tensor | None]


class _NotFinite(Exception):
    """A frame whose latents (`network` is the denoiser) or pixels (a decoder) aren't all finite; `latents`
    [1, 4, h, w] where it can be decoded again in fp32."""

    def __init__(self, network: str, latents: Tensor | None = None) -> None:
        super().__init__(network)
        self.network = network
        self.latents = latents


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Frames that are decoded in one call, `again` in fp32; the host's tensors are filled when `copied` is passed.

    `latents` stay referenced until then, as another stream than the one they were made on reads them.
    """

    latents: Tensor
    pixels: Tensor  # [F, height, width, 3] uint8, on the host
    finite: Tensor  # [F, 2] bool, on the host: latents, picture
    kept: Tensor | None  # [F, 4, h, w] fp16, on the host, where the latents are wanted
    copied: torch.cuda.Event | None
    again: bool


@dataclass(eq=False)
class _Batch:
    """Frames that aren't all told: first they are drawn, then those whose embeddings are wanted wait for these.

    `again`: those that are decoded in fp32.
    """

    clock: StageClock
    frames: deque[tuple[Task, Future[_Drawn]]] = field(default_factory=deque)
    again: set[Task] = field(default_factory=set)
    drawn: list[tuple[Decoded, Tensor | None]] = field(default_factory=list)
    embeddings: Tensor | None = None  # [F, width], on the host
    copied: torch.cuda.Event | None = None


class FrameDecoder:
    """Decodes batches in the order in which they come; a frame whose latents are finite and whose picture isn't, which
    half precision makes of some, is decoded again by itself, in fp32.

    Args:
        networks: whose VAE decoder and image encoder it uses.
        overlapped: whether what follows on the UNet's work goes on beside it: on a side stream of a GPU, and in
            worker threads. If not, `submit` does all the work itself.

    Attributes:
        starved: whether embeddings, or a frame that is decoded again, wait until there is memory for them; `finished`
            tries again when it is called with nothing else going on.
    """

    def __init__(self, networks: Networks, *, overlapped: bool) -> None:
        self.starved = False
        self._most: int | None = None  # frames of one call of the VAE decoder, where memory didn't suffice for more
        self._networks = networks
        self._fp32: dict[str, Networks] = {}  # by decoder, which is all that they have; loaded when it is needed
        self._on_gpu = networks.device.type == "cuda"
        self._side = decoding_stream(networks.device) if overlapped and self._on_gpu else None
        self._workers = ThreadPoolExecutor(_WORKERS, "frames") if overlapped else None
        self._stopped = threading.Event()
        self._batches: deque[_Batch] = deque()

    @property
    def batches(self) -> int:
        """Batches of which `finished` has yet to tell frames."""
        return len(self._batches)

    @property
    def is_quiet(self) -> bool:
        """Whether all that was submitted is decoded."""
        return all(future.done() for batch in self._batches for _, future in batch.frames)

    def submit(self, tasks: Sequence[Task], latents: Tensor, clock: StageClock, chunk: int | None) -> int:
        """Decode frames.

        Args:
            tasks: whose frames they are; of one batch key.
            latents: [F, 4, h, w] fp32, not written again.
            clock: counts the decoder's time as "decode", the image encoder's as "references".
            chunk: frames of one call of the VAE decoder at the most; None: all. Halved where memory doesn't suffice.

        Returns:
            How many were taken: those behind them didn't find enough memory even one at a time.
        """
        batch, done = _Batch(clock), 0
        chunk = min(chunk or len(tasks), self._most or len(tasks))
        while done < len(tasks):
            size = min(chunk, len(tasks) - done)
            try:
                keep = any(task.keep_latents for task in tasks[done : done + size])
                decoder = tasks[0].job.decoder
                part = self._decode(self._networks, decoder, latents[done : done + size], clock, keep)
            except torch.OutOfMemoryError:
                if size == 1:
                    break
                self._most = chunk = -(-size // 2)
                continue
            for index, task in enumerate(tasks[done : done + size]):
                batch.frames.append((task, self._later(partial(self._finish, task, part, index))))
            done += size
        if batch.frames:
            self._batches.append(batch)
        return done

    def finished(self, *, alone: bool = False, last_try: bool = False) -> Iterator[Decoded]:
        """What became of frames since the last call, in the order in which they came; doesn't wait.

        Args:
            alone: whether nothing else is going on, so that what was short of memory is tried again.
            last_try: whether all memory that can be given back was; a frame that can't be decoded again fails then.

        Raises:
            torch.OutOfMemoryError: with `alone`, there is no memory for the embeddings, or to decode a frame again; may
                be called again.
        """
        while self._batches:
            batch = self._batches[0]
            while batch.frames and batch.frames[0][1].done():
                task, future = batch.frames[0]
                pixels = None
                try:
                    picture, pixels, kept = future.result()
                    decoded = Decoded(task, picture, latents=kept, again=task in batch.again)
                except _NotFinite as error:
                    decoded = Decoded(task, not_finite=error.network)
                    if error.latents is not None:
                        if self._decode_again(batch, error.latents, alone, last_try):
                            continue
                        return
                except (CheckpointError, torch.OutOfMemoryError) as error:
                    decoded = Decoded(task, error=error)
                batch.frames.popleft()
                if batch.drawn or pixels is not None:
                    batch.drawn.append((decoded, pixels))  # told in order, once embeddings are known
                else:
                    yield decoded
            if batch.frames:
                return
            if batch.drawn:
                if batch.embeddings is None and not self._embed(batch, alone):
                    return
                if not is_passed(batch.copied):
                    return
                rows = iter(batch.embeddings if batch.embeddings is not None else ())
                for decoded, pixels in batch.drawn:
                    embedding = None if pixels is None else next(rows).float()
                    if embedding is not None and not embedding.isfinite().all():
                        yield Decoded(decoded.task, not_finite="image_encoder")
                    else:
                        yield replace(decoded, embedding=embedding)
            self._batches.popleft()

    def drop(self) -> tuple[Task, ...]:
        """Give up the batch that comes next, as one for whose embeddings there is no memory; its frames."""
        self.starved = False
        return tuple(decoded.task for decoded, _ in self._batches.popleft().drawn)

    def forget(self) -> None:
        """Let go of decoders in fp32, which are loaded again when they are needed."""
        self._fp32.clear()

    def close(self) -> None:
        """Stop the workers, without waiting for the device."""
        self._stopped.set()
        if self._workers:
            self._workers.shutdown(cancel_futures=True)

    def _decode(self, networks: Networks, decoder: str, latents: Tensor, clock: StageClock, keep: bool) -> _Chunk:
        with self._beside(), clock.stage("decode"):
            pixels, finite = decode_latents(networks, latents, decoder)
            on_host = self._to_host(pixels), self._to_host(finite), self._to_host(latents.half()) if keep else None
            return _Chunk(latents, *on_host, recorded_event(self._networks.device), networks is not self._networks)

    def _decode_again(self, batch: _Batch, latents: Tensor, alone: bool, last_try: bool) -> bool:
        """Put the batch's next frame on its way in fp32; False where there is no memory for that beside other work.

        Raises:
            torch.OutOfMemoryError: with `alone`, and unless it is the last try, there is none at all.
        """
        if self.starved and not alone:
            return False
        task, _ = batch.frames[0]
        decoder = task.job.decoder
        try:
            if decoder not in self._fp32:
                assert self._networks.load_fp32 is not None
                with self._beside():  # whose memory it is then, when it goes
                    self._fp32[decoder] = self._networks.load_fp32(decoder)
            part = self._decode(self._fp32[decoder], decoder, latents, batch.clock, task.keep_latents)
            future = self._later(partial(self._finish, task, part, 0))
        except (CheckpointError, torch.OutOfMemoryError) as error:
            self.starved = isinstance(error, torch.OutOfMemoryError) and not last_try
            if self.starved and alone:
                raise
            if self.starved:
                return False
            future = Future()
            future.set_exception(error)
        else:
            self.starved = False
            batch.again.add(task)
        batch.frames[0] = task, future
        return True

    def _embed(self, batch: _Batch, alone: bool) -> bool:
        """Put the embeddings of a drawn batch on their way; False where there is no memory for them beside other work.

        Raises:
            torch.OutOfMemoryError: with `alone`, there is none at all.
        """
        if self.starved and not alone:
            return False
        pixels = torch.stack([pixels for _, pixels in batch.drawn if pixels is not None])
        try:
            with self._beside(), batch.clock.stage("references"):
                embeddings = embed_pixels(self._networks, pixels.pin_memory() if self._on_gpu else pixels)
                batch.embeddings = self._to_host(embeddings)
                batch.copied = recorded_event(self._networks.device)
        except torch.OutOfMemoryError:
            self.starved = True
            if alone:
                raise
            return False
        self.starved = False
        return True

    def _beside(self) -> AbstractContextManager[object]:
        """Inside, work goes to the side stream, behind what is on the current one now."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._networks.device))
            stack.enter_context(torch.cuda.stream(self._side))
        return stack

    def _to_host(self, tensor: Tensor) -> Tensor:
        if not self._on_gpu:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def _later(self, call: Callable[[], _Drawn]) -> Future[_Drawn]:
        if self._workers:
            return self._workers.submit(call)
        future: Future[_Drawn] = Future()
        try:
            future.set_result(call())
        except _NotFinite as error:
            future.set_exception(error)
        return future

    def _finish(self, task: Task, chunk: _Chunk, index: int) -> _Drawn:
        while not is_passed(chunk.copied):
            if self._stopped.is_set():
                raise CancelledError
            time.sleep(POLL_SECONDS)
        latents, picture = chunk.finite[index].tolist()
        if not picture:
            # one bad reference would poison every frame of the next iteration
            if not latents:
                raise _NotFinite("denoiser")
            decoder = task.job.decoder
            in_half = self._networks.numerics[decoder] != "fp32" and self._networks.load_fp32 is not None
            raise _NotFinite(decoder, chunk.latents[index : index + 1] if in_half and not chunk.again else None)
        drawn = to_picture(chunk.pixels[index])
        kept = chunk.kept[index].clone() if chunk.kept is not None and task.keep_latents else None
        return drawn, clip_pixels(drawn) if task.embed else None, kept
