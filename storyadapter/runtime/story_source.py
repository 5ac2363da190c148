"""A story as a source of frame jobs, with one barrier per iteration: there only embeddings are exchanged."""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from storyadapter.method.control_pictures import Controls
from storyadapter.method.events import (
    Event,
    FrameFinished,
    IterationFinished,
    IterationStarted,
    MicroBatchHalved,
    PromptTruncated,
    RunFinished,
    RunStarted,
    StepFinished,
)
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.method.story import FinalFrame
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.batches import StepDone
from storyadapter.runtime.conditioning import TEXTS_AT_ONCE, Tokenizers
from storyadapter.runtime.decoding import Decoded
from storyadapter.runtime.frame_store import FrameStore
from storyadapter.runtime.jobs import Control, FrameJob, References, Task, TextGroup
from storyadapter.runtime.memory import Batching


@dataclass(frozen=True)
class FinishedIteration:
    """Where a stopped run goes on: all pictures of its last finished iteration, in story order."""

    iteration: int
    pictures: Sequence[Image.Image]


class StorySource:
    """Gives tasks of a story as soon as their references are known, takes what became of them, and tells it as events.

    Args:
        frames: what decides each frame beside the plan.
        plan: every other setting.
        model: key of the model, as in `FrameJob`.
        numerics: of the networks.
        tokenizers: of the model.
        batching: how many frames are drawn at once.
        texts_at_once: texts of one call of the text encoders.
        workers: that draw it: an iteration has as many batches for each of them.
        resume: pictures to go on from.
        store: where frames are kept, and found again.
        controls: of each frame its control pictures, as `read_controls` gives them.

    Attributes:
        ready: tasks that can be drawn, in story order.
        served: what was drawn for it, in `FrameJob.cost` over its share; kept by the scheduler.
        share: of the devices, beside other stories.
        error: why it can't be drawn; nothing more comes of it then.
    """

    def __init__(
        self,
        frames: Sequence[FinalFrame],
        plan: RunPlan,
        *,
        model: str,
        numerics: Numerics,
        tokenizers: Tokenizers,
        batching: Batching,
        texts_at_once: int = TEXTS_AT_ONCE,
        workers: int = 1,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
        controls: Controls = (),
    ) -> None:
        self.plan = plan
        self.batching = batching
        self.ready: deque[Task] = deque()
        self.served = 0.0
        self.share = 1
        self.error: BaseException | None = None
        self._story = frames
        self._controls = controls or ((),) * len(frames)
        self._model = model
        self._numerics = numerics
        self._store = store
        self._workers = workers
        self._max_frames = batching.max_frames  # halved where memory didn't suffice
        negatives = tuple(dict.fromkeys(frame.negative_prompt for frame in frames if frame.negative_prompt is not None))
        texts = [*negatives, *(frame.prompt for frame in frames)]
        groups = TextGroup.split(texts, texts_at_once, *plan.size)
        self._texts = [(group, index) for group in groups for index in range(len(group.texts))]
        self._negatives = dict(zip(negatives, self._texts, strict=False))
        self._events: deque[tuple[Event, Future[None] | None]] = deque()
        self._saving = 0
        self._seconds: dict[str, float] = {}
        self._iteration = resume.iteration + 1 if resume else 0
        self._keys: tuple[str, ...] = ()  # of the frames of the iteration before
        self._given: list[Tensor | Image.Image] = []  # their embeddings, or pictures that have yet to be embedded
        self._starts: list[Tensor] = []  # their latents, where the next iteration starts from them
        self._begin_run(resume, tokenizers)

    @property
    def frames(self) -> int:
        """N."""
        return len(self._story)

    @property
    def texts(self) -> int:
        """Texts that are encoded for it: a prompt per frame, and the distinct negative prompts."""
        return len(self._texts)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more comes of it."""
        return self.error is not None or (self._iteration == self.plan.iterations and not self._events)

    @property
    def is_saving(self) -> bool:
        """Whether more frames wait to be kept than one batch has: then nothing more of it is drawn, so that a process
        that is killed loses little."""
        return self._saving > self.batching.max_frames

    @property
    def to_embed(self) -> list[Image.Image]:
        """Pictures whose embeddings the next iteration waits for; give them to `take_embeddings`."""
        return [given for given in self._given if isinstance(given, Image.Image)]

    @property
    def embedding_groups(self) -> Sequence[range] | None:
        """Which of `to_embed` are embedded in one call: those that a run without interruption would; None: any."""
        everything = len(self.to_embed) == self.frames
        return split_evenly(self.frames, self.batching.max_frames) if everything else None

    def take_embeddings(self, embeddings: Tensor) -> None:
        """[n, width] fp32 on the CPU: of `to_embed`."""
        rows = iter(embeddings)
        self._given = [next(rows) if isinstance(given, Image.Image) else given for given in self._given]
        self._begin_iteration()

    def take(self) -> Task:
        """The next ready task, which is drawn now."""
        if self._groups:
            self._groups[0] -= 1
            if not self._groups[0]:
                self._groups.popleft()
        return self.ready.popleft()

    def take_equal(self, task: Task) -> list[Task]:
        """Its ready tasks whose frames are that of another story's task."""
        equal = [
            mine
            for mine in self.ready
            if mine.job.key == task.job.key and mine.embed <= task.embed and mine.keep_latents <= task.keep_latents
        ]
        if equal:
            self._groups.clear()
            for mine in equal:
                self.ready.remove(mine)
        return equal

    def next_size(self, capacity: int) -> int:
        """How many tasks the next batch takes if the story has the device for itself: by the split of the whole
        iteration."""
        if self._groups:
            return min(self._groups[0], capacity)
        return len(split_evenly(len(self.ready), capacity)[0])

    def give_back(self, tasks: Sequence[Task]) -> None:
        """Tasks that couldn't be drawn come again."""
        self._groups.clear()
        self.ready.extendleft(reversed(tasks))

    def give_back_batch(self, tasks: Sequence[Task]) -> None:
        """A batch that was lost comes again, with the same frames: of those that are told, nothing more is taken."""
        if self._groups or not self.ready:
            self._groups.appendleft(len(tasks))
        self.ready.extendleft(reversed(tasks))

    def halved(self, tasks: Sequence[Task], max_frames: int) -> None:
        """There was no memory for these tasks in one batch; from now on, at most `max_frames`."""
        self._groups.clear()
        self._max_frames = min(self._max_frames, max_frames)
        self._tell(MicroBatchHalved(self._iteration, _span(tasks), max_frames))
        if self._store:
            rest = split_evenly(len(self.ready), max_frames) if self.ready else ()
            self._store.begin_iteration(self._iteration, [*map(len, self._batches), *map(len, rest)])

    def step_done(self, tasks: Sequence[Task], report: StepDone) -> None:
        """Of a batch with these tasks of this story."""
        self._tell(StepFinished(tasks[0].iteration, _span(tasks), report.step, report.steps))

    def frame_done(self, decoded: Decoded) -> None:
        """One of its tasks is drawn, or can't be."""
        task, picture = decoded.task, decoded.picture
        if picture is None:
            self.fail(decoded.error or RuntimeError("a frame without a picture"))
            return
        if task.frame in self._embeddings:  # drawn again with those that were missing in its batch
            return
        self._embeddings[task.frame] = decoded.embedding
        if decoded.latents is not None:
            self._latents[task.frame] = decoded.latents
        kept = decoded.embedding, decoded.latents
        event = FrameFinished(task.iteration, task.frame, task.job.scale, picture, task.job.key, *kept)
        self._tell(event, self._store.save(event) if self._store else None)

    def batch_done(self, tasks: Sequence[Task], seconds: Mapping[str, float]) -> None:
        """A batch with these tasks of this story has ended, for which it took so many seconds of each stage."""
        for stage, took in seconds.items():
            mine = self._seconds if stage == "text" else self._stages
            mine[stage] = mine.get(stage, 0.0) + took
        self._batches.append(_span(tasks))
        self._open -= len(tasks)
        if not self._open and not self.error:
            self._end_iteration()

    def fail(self, error: BaseException) -> None:
        """The story can't be drawn."""
        self.error = self.error or error
        self.ready.clear()

    def events(self) -> Iterator[Event]:
        """What there is to tell; frames once they are kept.

        Raises:
            RunError: a frame can't be kept.
        """
        while self._events and (self._events[0][1] is None or self._events[0][1].done()):
            event, saved = self._events.popleft()
            if saved is not None:
                self._saving -= 1
                saved.result()
            if isinstance(event, IterationFinished) and self._store:
                self._store.finish_iteration(event.iteration, event.seconds, [len(batch) for batch in event.batches])
            yield event

    def _tell(self, event: Event, saved: Future[None] | None = None) -> None:
        self._saving += saved is not None
        self._events.append((event, saved))

    def _begin_run(self, resume: FinishedIteration | None, tokenizers: Tokenizers) -> None:
        """Find how far the story has come."""
        if resume:
            self._keys = tuple(map(_picture_key, resume.pictures))
            self._given = list(resume.pictures)
        removed = self._store.kept_from() if self._store else 0
        while self._store and self._iteration < self.plan.iterations:
            jobs = self._jobs()
            found = self._stored(jobs)
            if len(found) < self.frames and self._iteration >= removed:
                break
            # a process may have been killed when all frames were kept, and before that was recorded
            self._store.finish_iteration(self._iteration, {}, self._split())
            self._keys = tuple(job.key for job in jobs)
            self._given = [found[frame] for frame in sorted(found)]
            self._starts = [latents for _, latents in sorted(self._latents.items())]
            self._iteration += 1
        if self._iteration and self._iteration == removed:  # what would be gone on from is gone
            self._iteration, self._keys, self._given = 0, (), []
        first = self._iteration
        self._begin_iteration()
        whole = self.plan.iterations - first - bool(self.ready)  # iterations of which every frame is to be drawn
        batches = split_evenly(self.frames, self.batching.max_frames, self._workers)
        kept, left = self.batching.keep_text, len(self.ready) + whole * self.frames
        told: list[Event] = [RunStarted(self.frames, self.plan.iterations, first, batches, kept, left=left)]
        told += truncated(self._story, self.plan, tokenizers)
        self._events.extendleft((event, None) for event in reversed(told))

    def _split(self) -> list[int]:
        """How the current iteration is split into batches: as it was when it was begun before, or evenly."""
        split = self._store.split(self._iteration) if self._store else None
        if split and sum(split) == self.frames:
            return list(split)
        return [len(batch) for batch in split_evenly(self.frames, self._max_frames, self._workers)]

    def _stored(self, jobs: Sequence[FrameJob]) -> dict[int, Tensor | Image.Image]:
        """The frames of an iteration that are kept: by their embedding, or the picture where that is missing."""
        found: dict[int, Tensor | Image.Image] = {}
        self._latents: dict[int, Tensor] = {}
        for frame, job in enumerate(jobs):
            stored = self._store.find(self._iteration, frame, job.key) if self._store else None
            if stored is not None and (stored.latents is not None or not self._keeps_latents):
                if self._keeps_latents:
                    self._latents[frame] = stored.latents
                found[frame] = stored.picture() if stored.embedding is None else stored.embedding
        return found

    @property
    def _keeps_latents(self) -> bool:
        """Whether the next iteration starts from the frames of the current one."""
        return self.plan.strength < 1 and self._iteration + 1 < self.plan.iterations

    def _jobs(self) -> list[FrameJob]:
        """Those of the current iteration."""
        plan, scale = self.plan, None
        iteration = min(self._iteration, plan.iterations - 1)
        if 0 < self._iteration < plan.iterations:
            scale = plan.scale_of(self._iteration)
        guided, guidance = plan.is_guided_in(iteration), plan.guidance_in(iteration)
        starts = self._keys if scale is not None and plan.strength < 1 else (None,) * self.frames
        return [
            FrameJob(
                self._model,
                self._numerics,
                *plan.size,
                frame.prompt,
                frame.negative_prompt if guided else None,
                guidance if guided or plan.embeds_guidance else None,
                plan.sampler_in(iteration),
                frame.seed,
                scale,
                self._keys if scale is not None else (),
                plan.guidance_interval if guided else (0.0, 1.0),
                start,
                tuple(
                    Control(picture.key, use.scale, use.start, use.end) if picture else None
                    for picture, use in zip(pictures, plan.controls, strict=False)
                ),
            )
            for frame, start, pictures in zip(self._story, starts, self._controls, strict=True)
        ]

    def _begin_iteration(self) -> None:
        self._groups: deque[int] = deque()
        self._stages: dict[str, float] = {}
        self._batches: list[Sequence[int]] = []
        if self._iteration == self.plan.iterations:
            self._given = []
            self._tell(RunFinished(self._seconds))
            return
        jobs = self._jobs()
        references = None
        if self._iteration:
            if self.to_embed:
                return
            embeddings = torch.stack([given for given in self._given if isinstance(given, Tensor)])
            references = References(self._keys, embeddings)
        self._embeddings: dict[int, Tensor | Image.Image | None] = dict(self._stored(jobs))
        self._found = frozenset(self._embeddings)
        self._tell(IterationStarted(self._iteration, jobs[0].scale, tuple(sorted(self._found))))
        prompts, last = self._texts[len(self._negatives) :], self._iteration + 1 == self.plan.iterations
        tasks = [
            Task(
                self,
                job,
                self._iteration,
                frame,
                (prompts[frame], *([] if job.negative_prompt is None else [self._negatives[job.negative_prompt]])),
                references,
                embed=not last,
                start=self._starts[frame] if job.start else None,
                control=self._controls[frame],
                keep_latents=self._keeps_latents,
                room=self.plan.references(self.frames),
            )
            for frame, job in enumerate(jobs)
        ]
        # a batch of which a frame is missing is drawn again whole: its frames have the bytes of an uninterrupted run
        split, start = self._split(), 0
        if self._store:
            self._store.begin_iteration(self._iteration, split)
        for size in split:
            group = tasks[start : start + size]
            start += size
            missing = [task for task in group if task.frame not in self._found]
            if missing and size > self._max_frames:  # it can't be drawn whole
                group = missing
            if missing:
                self.ready.extend(group)
                self._groups.extend(len(part) for part in split_evenly(len(group), self._max_frames))
            else:
                self._batches.append(_span(group))
        self._open = len(self.ready)
        if not self._open:
            self._end_iteration()

    def _end_iteration(self) -> None:
        jobs = self._jobs()
        for stage, seconds in self._stages.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        batches = tuple(sorted(self._batches, key=lambda frames: frames[0]))
        self._tell(IterationFinished(self._iteration, self._stages, batches))
        self._keys = tuple(job.key for job in jobs)
        self._given = [given for _, given in sorted(self._embeddings.items()) if given is not None]
        self._starts = [latents for _, latents in sorted(self._latents.items())]
        self._iteration += 1
        self._begin_iteration()


def truncated(frames: Sequence[FinalFrame], plan: RunPlan, tokenizers: Tokenizers) -> Iterator[PromptTruncated]:
    """Every text of a story of which the model won't read the end, each once."""
    for number, frame in enumerate(frames):
        if words := tokenizers.words_cut_off(frame.prompt):
            yield PromptTruncated(number, words)
    told = set()
    for number, frame in enumerate(frames):
        negative = frame.negative_prompt
        if negative is not None and negative not in told:
            told.add(negative)
            if words := tokenizers.words_cut_off(negative):
                yield PromptTruncated(None if negative == plan.negative_prompt else number, words, negative=True)


def _span(tasks: Sequence[Task]) -> Sequence[int]:
    """The frames of some tasks: a range where they follow each other."""
    frames = [task.frame for task in tasks]
    return range(frames[0], frames[-1] + 1) if frames == [*range(frames[0], frames[-1] + 1)] else tuple(frames)


def _picture_key(picture: Image.Image) -> str:
    rgb = picture.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
