"""Latents of micro-batches to pictures and their CLIP embeddings: on a GPU beside the UNet's work on the next ones.

The VAE and the image encoder run on a stream of their own; the bytes of the pictures come to the host by a copy that
nobody waits for but a worker thread, which makes the Pillow picture of them and what the image encoder reads of it.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from storyadapter.method.errors import Field, RunError
from storyadapter.model.networks import Networks
from storyadapter.runtime.clock import StageClock, is_passed, recorded_event
from storyadapter.runtime.pictures import clip_pixels, decode_latents, embed_pixels, to_picture
from storyadapter.runtime.streams import decoding_stream

POLL_SECONDS: Final = 0.001
_WORKERS: Final = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Frames that are decoded in one call; the host's tensors are filled when `copied` is passed.

    `latents` stay referenced until then, as another stream than the one they were made on reads them.
    """

    latents: Tensor
    pixels: Tensor  # [F, height, width, 3] uint8, on the host
    finite: Tensor  # [F, 2] bool, on the host: latents, picture
    copied: torch.cuda.Event | None


@dataclass(eq=False)
class _Batch:
    """A micro-batch whose frames aren't all told."""

    embed: bool
    frames: deque[tuple[int, Future]] = field(default_factory=deque)
    pixels: list[Tensor] = field(default_factory=list)


class FrameDecoder:
    """Decodes micro-batches in the order in which they come.

    Args:
        networks: whose VAE decoder and image encoder it uses.
        chunk: frames of one call of the VAE decoder at the most; None: those of a micro-batch. Halved where the
            memory doesn't suffice.
        overlapped: whether what follows on the UNet's work goes on beside it: on a side stream of a GPU, and in
            worker threads. If not, `submit` does all the work itself.
    """

    def __init__(self, networks: Networks, *, chunk: int | None, overlapped: bool) -> None:
        self.chunk = chunk
        self.overlapped = overlapped
        self._networks = networks
        self._on_gpu = networks.device.type == "cuda"
        self._side = decoding_stream(networks.device) if overlapped and self._on_gpu else None
        self._workers = ThreadPoolExecutor(_WORKERS, "frames") if overlapped else None
        self._stopped = threading.Event()
        self._batches: deque[_Batch] = deque()
        self._embeddings: list[Tensor | list[Tensor]] = []

    @property
    def batches(self) -> int:
        """Micro-batches of which `finished` has yet to tell frames."""
        return len(self._batches)

    def submit(self, iteration: int, frames: range, latents: Tensor, clock: StageClock, *, embed: bool) -> range:
        """Decode frames of an iteration.

        Args:
            latents: [F, 4, h, w] fp32, not written again.
            clock: counts the decoder's time as "decode".
            embed: whether `take_embeddings` shall give their embeddings.

        Returns:
            Those frames at the end for which not even one at a time found enough memory.
        """
        batch, done = _Batch(embed), 0
        while done < len(frames):
            size = min(self.chunk or len(frames), len(frames) - done)
            try:
                chunk = self._decode(latents[done : done + size], clock)
            except torch.OutOfMemoryError:
                if size == 1:
                    break
                self.chunk = -(-size // 2)
                continue
            for index in range(size):
                frame = frames[done + index]
                batch.frames.append((frame, self._later(partial(self._finish, iteration, frame, chunk, index, embed))))
            done += size
        if batch.frames:
            self._batches.append(batch)
        return frames[done:]

    def finished(self) -> Iterator[tuple[int, Image.Image]]:
        """The frames that were finished since the last call, in the order in which they came; doesn't wait.

        Raises:
            RunError: a frame has values that aren't finite.
        """
        while self._batches:
            batch = self._batches[0]
            while batch.frames and batch.frames[0][1].done():
                frame, future = batch.frames.popleft()
                picture, pixels = future.result()
                batch.pixels.append(pixels)
                yield frame, picture
            if batch.frames:
                return
            if batch.embed:
                self._embeddings.append(self._embed_or_keep(batch.pixels))
            self._batches.popleft()

    def take_embeddings(self) -> Tensor:
        """[N, width] in the engine's dtype: CLIP embeddings of all frames since the last call, in their order.

        Only where `submit` was told to, and when all frames are told.

        Raises:
            torch.OutOfMemoryError: the memory doesn't suffice for one frame; may be called again when there is more.
        """
        for index, part in enumerate(self._embeddings):
            if isinstance(part, list):
                self._embeddings[index] = torch.cat([self._embed([pixels]) for pixels in part])
        parts = self._embeddings
        if self._side is not None:
            current = torch.cuda.current_stream(self._networks.device)
            current.wait_stream(self._side)
            for part in parts:
                part.record_stream(current)
        together = torch.cat(parts)
        self._embeddings = []  # not before: the memory may not suffice for all of them twice
        return together

    def close(self) -> None:
        """Stop the workers, without waiting for the device."""
        self._stopped.set()
        if self._workers:
            self._workers.shutdown(cancel_futures=True)

    def _decode(self, latents: Tensor, clock: StageClock) -> _Chunk:
        with self._beside(), clock.stage("decode"):
            pixels, finite = decode_latents(self._networks, latents)
            return _Chunk(latents, self._to_host(pixels), self._to_host(finite), recorded_event(self._networks.device))

    def _embed_or_keep(self, pixels: list[Tensor]) -> Tensor | list[Tensor]:
        """Embeddings, or, where the memory doesn't suffice beside other work, what is embedded when that has ended."""
        try:
            return self._embed(pixels)
        except torch.OutOfMemoryError:
            return pixels

    def _embed(self, pixels: list[Tensor]) -> Tensor:
        with self._beside():
            together = torch.stack(pixels)
            return embed_pixels(self._networks, together.pin_memory() if self._on_gpu else together)

    def _beside(self) -> AbstractContextManager:
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

    def _later(self, call: Callable[[], tuple[Image.Image, Tensor | None]]) -> Future:
        if self._workers:
            return self._workers.submit(call)
        future: Future = Future()
        try:
            future.set_result(call())
        except RunError as error:
            future.set_exception(error)
        return future

    def _finish(
        self, iteration: int, frame: int, chunk: _Chunk, index: int, embed: bool
    ) -> tuple[Image.Image, Tensor | None]:
        while not is_passed(chunk.copied):
            if self._stopped.is_set():
                raise CancelledError
            time.sleep(POLL_SECONDS)
        latents, picture = chunk.finite[index].tolist()
        if not picture:
            # one bad reference would poison every frame of the next iteration
            networks = self._networks
            precision = Field("vae_precision" if latents else "precision")
            raise RunError(
                f"iteration {iteration}, frame {frame}: the {'VAE' if latents else 'UNet'} gave values that are "
                f"not finite in {networks.numerics['vae_decoder' if latents else 'denoiser']}",
                advice=("try ", precision, " bf16 or fp32, with another ", Field("out")),
            )
        drawn = to_picture(chunk.pixels[index])
        return drawn, clip_pixels(drawn) if embed else None
