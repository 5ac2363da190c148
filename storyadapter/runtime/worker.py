"""One device: it draws batches and tells frames one by one. It knows no story.

The host puts at most two steps on the stream ahead of the device and learns from events what that has finished, so that
what is cancelled ends soon. At most two batches are on their way: while one is decoded, the next is denoised.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakSet

import torch
from PIL import Image
from torch import Tensor

from storyadapter.method.noise import draw_noise
from storyadapter.method.plan import guided_calls
from storyadapter.method.sampler import sampler_of
from storyadapter.model.networks import Networks
from storyadapter.runtime.batches import Batch, BatchDone, FrameDone, OutOfMemory, Report, StepDone
from storyadapter.runtime.clock import DeviceMarks, StageClock
from storyadapter.runtime.conditioning import TextCache, Tokenizers
from storyadapter.runtime.control import ControlConditions, control_rows
from storyadapter.runtime.decoding import FrameDecoder
from storyadapter.runtime.denoising import DenoisingState, FrameRows, SamplerInputs, StatePool
from storyadapter.runtime.finiteness import first_not_finite, not_finite_error
from storyadapter.runtime.jobs import FrameJob, Task
from storyadapter.runtime.memory import release_memory
from storyadapter.runtime.pictures import embed_pictures
from storyadapter.runtime.reference_bank import ReferenceBank

STEPS_AHEAD: Final = 2
_SAMPLERS_KEPT: Final = 8


@dataclass(eq=False)
class _Work:
    """A batch on its way.

    Attributes:
        state: None until the first step can be made.
        queued: steps that were put on the stream.
        untold: frames of it that aren't told.
        left: frames at its end that weren't handed to the decoder, and their latents.
        crowded: whether the decoder had no room for them beside other work.
        retried: whether what comes before the first step was tried again.
    """

    batch: Batch
    clock: StageClock
    calls: int
    untold: int
    state: DenoisingState | None = None
    queued: int = 0
    left: tuple[tuple[Task, ...], Tensor] | None = None
    crowded: bool = False
    retried: bool = False
    short_of: BaseException | None = None


class Worker:
    """Runs batches on the device of its networks.

    Args:
        networks, tokenizers: of one model.
        states: buffers, shared with other workers of this device that never run at the same moment.
        overlapped: whether decoding and what follows on it go on beside the UNet's work on the next batch; by default
            on a GPU alone, as there is nothing to gain on a CPU.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizers: Tokenizers,
        states: StatePool,
        *,
        overlapped: bool | None = None,
    ) -> None:
        self.networks = networks
        self._states = states
        self._tokenizers = tokenizers
        self._texts = TextCache(networks, tokenizers)
        self._bank = ReferenceBank(networks)
        self._conditions = ControlConditions(networks)
        self._samplers: OrderedDict[tuple[object, ...], SamplerInputs] = OrderedDict()
        on_gpu = networks.device.type == "cuda"
        self._decoder = FrameDecoder(networks, overlapped=on_gpu if overlapped is None else overlapped)
        self._marks: DeviceMarks[tuple[_Work, int]] = DeviceMarks(networks.device)
        self._denoising: _Work | None = None
        self._decoding: dict[Task, _Work] = {}
        self._cancelled: WeakSet[object] = WeakSet()

    @property
    def is_free(self) -> bool:
        """Whether it takes a batch now."""
        return self._denoising is None and self._decoder.batches <= 1 and not self._decoder.starved

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._denoising is None and not self._decoder.batches and not len(self._marks)

    def start(self, batch: Batch) -> None:
        """Take a batch; only where `is_free`."""
        steps = sampler_of(batch.tasks[0].job.sampler).calls
        self._denoising = _Work(batch, StageClock(self.networks.device), steps, untold=len(batch.tasks))

    def advance(self) -> list[Report]:
        """Do the next piece of work, if the device is ready for it, and tell what it has finished; doesn't wait.

        Empty where there was nothing to do and nothing to tell.
        """
        reports: list[Report] = []
        work = self._denoising
        if work is not None:
            if work.left is None and all(task.owner in self._cancelled for task in work.batch.tasks):
                if work.state is not None:
                    self._states.give(work.state)
                self._denoising = None
            elif work.short_of is not None:
                self._give_up(work, reports)
            elif work.left is not None:
                self._decode_alone(work, reports)
            else:
                self._go_on(work)
        frames = self._decoded()  # asked for first: no frame is told before its steps
        reports += (StepDone(work.batch, step, work.calls) for work, step in self._marks.passed())
        return reports + frames

    def embed(self, pictures: Sequence[Image.Image], groups: Sequence[range] | None = None) -> Tensor:
        """[N, width] fp32 on the CPU: CLIP embeddings of pictures; only where `is_free`.

        Args:
            groups: which pictures go into one call; by default as many as the engine takes.

        Raises:
            torch.OutOfMemoryError: there is no memory for one call.
        """
        for last_try in (False, True):
            try:
                with torch.inference_mode():
                    return embed_pictures(self.networks, pictures, groups).float().cpu()
            except torch.OutOfMemoryError:
                if last_try:
                    raise
            self.release()
        raise AssertionError("the loop returns or raises")

    def cancel(self, owner: object) -> None:
        """Whoever owns these frames doesn't want them any more: a batch with only such frames ends before its next
        step; in a shared one they are drawn and dropped."""
        self._cancelled.add(owner)

    def release(self) -> None:
        """Let go of everything that is kept for speed alone."""
        self._texts.forget()
        self._bank.forget()
        self._conditions.forget()
        self._samplers.clear()
        self._decoder.forget()
        release_memory(self.networks, self._states)

    def close(self) -> None:
        """Stop, without waiting for the device."""
        self._decoder.close()

    @property
    def _is_alone(self) -> bool:
        """Whether nothing but the batch that is being denoised is on its way."""
        return not self._decoder.batches and not len(self._marks)

    def _go_on(self, work: _Work) -> None:
        """Make a batch ready, or put its next step on the stream, or hand it to the decoder."""
        try:
            with torch.inference_mode():
                if work.state is None:
                    work.state = self._ready(work)
                if len(self._marks) < STEPS_AHEAD:
                    with work.clock.stage("denoise"):
                        work.state.advance()
                    work.queued += 1
                    self._marks.put((work, work.queued))
        except torch.OutOfMemoryError as error:
            work.short_of = error
            return
        if work.queued == work.calls:
            latents = work.state.x.clone()
            self._states.give(work.state)
            work.left = (work.batch.tasks, latents)
            self._decode(work)

    def _ready(self, work: _Work) -> DenoisingState:
        batch, tasks = work.batch, work.batch.tasks
        with work.clock.stage("text"):
            places = [place for task in tasks for place in task.texts]
            texts = iter(self._texts.take(places, max(batch.keep_texts, len(set(places)))))
            keep = max(batch.keep_texts, len(tasks))
            conditions = self._conditions.take([task.control for task in tasks], keep)
        with work.clock.stage("references"):
            # of each frame what it attends to and, with guidance, the unconditional row of its λ
            asked = [
                (t.job.scale, r) for t in tasks for r in ([t.references, None] if t.job.is_guided else [t.references])
            ]
            bank = iter(self._bank.take(asked))
        with work.clock.stage("denoise"):
            frames = []
            for task, condition in zip(tasks, conditions, strict=True):
                job, sampler = task.job, self._sampler(task.job)
                steps, skipped = sampler.skipped + sampler.calls, sampler.skipped
                rows = FrameRows(next(texts), next(bank), sampler, guidance=job.guidance, start=task.start)
                rows = replace(rows, controls=control_rows(job.control, condition, steps, skipped))
                if job.is_guided:
                    calls = guided_calls(job.guidance_interval, steps, skipped)
                    rows = replace(rows, negative=next(texts), unconditional=next(bank), guided_calls=calls)
                frames.append(rows)
            state = self._states.take(frames, max(task.room for task in tasks))
            state.load(frames)
        return state

    def _sampler(self, job: FrameJob) -> SamplerInputs:
        key = (job.sampler, job.seed, job.height, job.width)
        if key not in self._samplers:
            scale = self.networks.geometry.pixels_per_latent
            table = sampler_of(job.sampler)
            noise = draw_noise(job.seed, job.height // scale, job.width // scale, table)
            self._samplers[key] = SamplerInputs.upload(table, noise, self.networks.device)
            if len(self._samplers) > _SAMPLERS_KEPT:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(key)
        return self._samplers[key]

    def _decode(self, work: _Work) -> None:
        """Hand what is left of a batch to the decoder; done with it where there was room for all."""
        assert work.left is not None
        tasks, latents = work.left
        self._decoding |= dict.fromkeys(tasks, work)
        taken = self._decoder.submit(tasks, latents, work.clock, work.batch.decode_frames)
        work.left = (tasks[taken:], latents[taken:]) if taken < len(tasks) else None
        if work.left is None and self._denoising is work:
            self._denoising = None

    def _decode_alone(self, work: _Work, reports: list[Report]) -> None:
        """Once nothing else is going on and memory was given back, decode what found no room beside other work."""
        if not self._is_alone:
            return
        assert work.left is not None
        if work.crowded:
            tasks, _ = work.left
            error = torch.OutOfMemoryError("a single frame can't be decoded")
            reports.append(OutOfMemory(work.batch, tasks, error, final=True))
            self._denoising = work.left = None
            return
        work.crowded = True
        self.release()
        self._decode(work)

    def _give_up(self, work: _Work, reports: list[Report]) -> None:
        """Once nothing else is going on, give back a batch for which there was no memory."""
        if not self._is_alone:
            return
        unready = work.state is None
        work.state = None
        self.release()
        if unready and not work.retried:
            work.retried, work.short_of = True, None
            return
        assert work.short_of is not None
        reports.append(OutOfMemory(work.batch, work.batch.tasks, work.short_of))
        self._denoising = None

    def _decoded(self) -> list[Report]:
        """Frames that are finished, and the batches that ended with them."""
        told: list[Report] = []
        alone = self._denoising is None and not len(self._marks) and self._decoder.is_quiet
        for last_try in (False, True):
            try:
                for decoded in self._decoder.finished(alone=alone, last_try=last_try):
                    if decoded.not_finite is not None:
                        first = first_not_finite(self.networks, self._tokenizers, decoded.task, decoded.not_finite)
                        decoded = replace(decoded, error=not_finite_error(self.networks, decoded.task, first))
                    told.append(FrameDone(decoded))
                    work = self._decoding.pop(decoded.task)
                    work.untold -= 1
                    if not work.untold:
                        if work.crowded and len(work.batch.tasks) > 1:
                            self.release()
                        told.append(BatchDone(work.batch, work.clock.seconds(), work.crowded))
                break
            except torch.OutOfMemoryError as error:
                self.release()
                if last_try:
                    tasks = self._decoder.drop()
                    told.append(OutOfMemory(self._decoding[tasks[0]].batch, tasks, error))
                    for task in tasks:
                        del self._decoding[task]
        return told
