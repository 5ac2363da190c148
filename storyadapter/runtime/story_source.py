"""A story as a source of frame jobs, with one barrier per iteration: there only embeddings are exchanged."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from storyadapter.runtime.frame_store import FrameStore, StoredFrame
from storyadapter.runtime.given_pictures import GivenPicture
from storyadapter.runtime.jobs import FrameJob, References, Task
from storyadapter.runtime.memory import Batching
from storyadapter.runtime.story_jobs import StoryJobs, StoryTexts, truncated


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
        pictures: those of a user's that frames name, by their keys.
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
        pictures: Mapping[str, Image.Image] | None = None,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
        controls: Controls = (),
    ) -> None:
        self.plan = plan
        self.batching = batching
        self.ready: deque[Task] = deque()
        self.served, self.share = 0.0, 1
        self.error: BaseException | None = None
        self._controls = controls or ((),) * len(frames)
        self._jobs = StoryJobs(frames, plan, model, numerics, self._controls)
        self._store = store
        self._stays: Collection[int] = store.stays if store else ()
        self._workers = workers
        self._max_frames = batching.max_frames  # halved where memory didn't suffice
        self._texts = StoryTexts(frames, texts_at_once, *plan.size)
        self._events: deque[tuple[Event, Future[None] | None]] = deque()
        self._saving = 0
        self._seconds: dict[str, float] = {}
        self._iteration = resume.iteration + 1 if resume else 0
        self._keys: tuple[str, ...] = ()  # of the frames of the iteration before
        self._given: list[Tensor | Image.Image] = []  # their embeddings, or pictures that have yet to be embedded
        self._pictures: dict[str, Tensor | Image.Image] = dict(pictures or {})  # a user's, as those
        self._starts: dict[int, Tensor] = {}  # their latents, where the next iteration starts from them
        self._begin_run(resume, tokenizers)

    @property
    def frames(self) -> int:
        """N."""
        return len(self._jobs.frames)

    @property
    def texts(self) -> int:
        """Texts that are encoded for it: a prompt per frame, and the distinct negative prompts."""
        return self._texts.count

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
        return [given for given in (*self._given, *self._pictures.values()) if isinstance(given, Image.Image)]

    @property
    def embedding_groups(self) -> Sequence[range] | None:
        """Which of `to_embed` are embedded in one call: those that a run without interruption would; None: any."""
        frames = sum(isinstance(given, Image.Image) for given in self._given)
        if frames not in (0, self.frames):
            return None
        most, groups = self.batching.max_frames, list[range]()
        for start, pictures in ((0, frames), (frames, len(self.to_embed) - frames)):
            split = split_evenly(pictures, most) if pictures else ()
            groups += (range(start + part.start, start + part.stop) for part in split)
        return groups

    def take_embeddings(self, embeddings: Tensor) -> None:
        """[n, width] fp32 on the CPU: of `to_embed`."""
        rows = iter(embeddings)
        self._given = [next(rows) if isinstance(given, Image.Image) else given for given in self._given]
        waiting = (key for key, given in self._pictures.items() if isinstance(given, Image.Image))
        self._pictures |= dict(zip(waiting, rows, strict=True))
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
        self._again += [task.frame] * decoded.again
        kept = decoded.embedding, decoded.latents, decoded.again
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
                split = [*map(len, event.batches)]
                self._store.finish_iteration(event.iteration, event.seconds, split, event.decoded_again)
            yield event

    def _tell(self, event: Event, saved: Future[None] | None = None) -> None:
        self._saving += saved is not None
        self._events.append((event, saved))

    def _begin_run(self, resume: FinishedIteration | None, tokenizers: Tokenizers) -> None:
        """Find how far the story has come."""
        if resume:
            self._keys = tuple(GivenPicture.of(picture).key for picture in resume.pictures)
            self._given = list(resume.pictures)
        removed = self._store.kept_from() if self._store else 0
        while self._store and self._iteration < self.plan.iterations:
            jobs = self._jobs.of(self._iteration, self._keys)
            found = self._stored(jobs)
            if len(found) < self.frames and self._iteration >= removed:
                break
            # a process may have been killed when all frames were kept, and before that was recorded
            again = [frame for frame in found if found[frame].decoded_again]
            self._store.finish_iteration(self._iteration, {}, self._split(), again)
            self._keys = _keys(jobs, found)
            self._given = [found[frame].given for frame in sorted(found)]
            self._starts = _latents(found)
            self._iteration += 1
        if self._iteration and self._iteration == removed:  # what would be gone on from is gone
            self._iteration, self._keys, self._given = 0, (), []
        first = self._iteration
        self._begin_iteration()
        whole = self.plan.iterations - first - bool(self.ready)  # iterations of which every frame is to be drawn
        drawn = self.frames - len(self._stays)
        batches = split_evenly(drawn, self.batching.max_frames, self._workers) if drawn else ()
        kept, left = self.batching.keep_text, len(self.ready) + whole * drawn
        rows = len(self.ready) * self.plan.rows_in(min(first, self.plan.iterations - 1))
        rows += drawn * sum(map(self.plan.rows_in, range(self.plan.iterations - whole, self.plan.iterations)))
        told: list[Event] = [RunStarted(self.frames, self.plan.iterations, first, batches, kept, left, rows)]
        told += truncated(self._jobs.frames, self.plan, tokenizers)
        self._events.extendleft((event, None) for event in reversed(told))

    def _split(self, drawn: int | None = None) -> list[int]:
        """How so many frames of the current iteration, by default all that don't stay, are split into batches: as when
        it was begun before, or evenly."""
        drawn = self.frames - len(self._stays) if drawn is None else drawn
        split = self._store.split(self._iteration) if self._store else None
        if split and sum(split) == drawn:
            return list(split)
        return [len(batch) for batch in split_evenly(drawn, self._max_frames, self._workers)] if drawn else []

    def _stored(self, jobs: Sequence[FrameJob]) -> dict[int, StoredFrame]:
        """The frames of the current iteration that are kept."""
        found = {}
        for frame, job in enumerate(jobs):
            stored = self._store.find(self._iteration, frame, job.key) if self._store else None
            if stored is not None and (stored.latents is not None or not self._keeps_latents or frame in self._stays):
                found[frame] = stored
        return found

    @property
    def _keeps_latents(self) -> bool:
        """Whether the next iteration starts from the frames of the current one."""
        return self.plan.strength < 1 and self._iteration + 1 < self.plan.iterations

    def _begin_iteration(self) -> None:
        self._groups: deque[int] = deque()
        self._stages: dict[str, float] = {}
        self._batches: list[Sequence[int]] = []
        if self._iteration == self.plan.iterations:
            self._given, self._pictures = [], {}
            self._tell(RunFinished(self._seconds))
            return
        jobs = self._jobs.of(self._iteration, self._keys)
        if self._iteration and not self.plan.keep_references:
            self._pictures = {}
        if self.to_embed:
            return
        references = self._references(jobs)
        found = self._stored(jobs)
        self._embeddings: dict[int, Tensor | Image.Image | None] = {f: kept.given for f, kept in found.items()}
        self._latents, self._drawn_keys = _latents(found), _keys(jobs, found)
        self._again = [frame for frame in found if found[frame].decoded_again]
        self._tell(IterationStarted(self._iteration, self.plan.scale_of(self._iteration), tuple(sorted(found))))
        last = self._iteration + 1 == self.plan.iterations
        tasks = [
            Task(
                self,
                job,
                self._iteration,
                frame,
                self._texts.of(frame, job),
                references.get(job.references),
                embed=not last,
                start=self._starts[frame] if job.start else None,
                control=self._controls[frame],
                keep_latents=self._keeps_latents,
                room=self.plan.references(self.frames, self._jobs.most_pictures),
            )
            for frame, job in enumerate(jobs)
            if frame not in self._stays or frame not in found
        ]
        # a batch of which a frame is missing is drawn again whole: its frames have the bytes of an uninterrupted run
        split, start = self._split(len(tasks)), 0
        if self._store:
            self._store.begin_iteration(self._iteration, split)
        for size in split:
            group = tasks[start : start + size]
            start += size
            missing = [task for task in group if task.frame not in found]
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

    def _references(self, jobs: Sequence[FrameJob]) -> dict[tuple[str, ...], References]:
        """What the frames of the current iteration attend to, each set once; nothing for those without any."""
        frames = [given for given in self._given if isinstance(given, Tensor)]

        def references(keys: tuple[str, ...]) -> References:
            pictures = [self._pictures[key] for key in keys[len(frames) :]]
            return References(keys, torch.stack([*frames, *(row for row in pictures if isinstance(row, Tensor))]))

        return {keys: references(keys) for keys in dict.fromkeys(job.references for job in jobs) if keys}

    def _end_iteration(self) -> None:
        for stage, seconds in self._stages.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        batches = tuple(sorted(self._batches, key=lambda frames: frames[0]))
        self._tell(IterationFinished(self._iteration, self._stages, batches, tuple(sorted(self._again))))
        self._keys = self._drawn_keys
        self._given = [given for _, given in sorted(self._embeddings.items()) if given is not None]
        self._starts = self._latents
        self._iteration += 1
        self._begin_iteration()


def _keys(jobs: Sequence[FrameJob], found: Mapping[int, StoredFrame]) -> tuple[str, ...]:
    """Of the jobs that drew, or will draw, each frame: one that stays was drawn by another than today's."""
    return tuple(found[frame].key if frame in found else job.key for frame, job in enumerate(jobs))


def _latents(found: Mapping[int, StoredFrame]) -> dict[int, Tensor]:
    return {frame: stored.latents for frame, stored in found.items() if stored.latents is not None}


def _span(tasks: Sequence[Task]) -> Sequence[int]:
    """The frames of some tasks: a range where they follow each other."""
    frames = [task.frame for task in tasks]
    return range(frames[0], frames[-1] + 1) if frames == [*range(frames[0], frames[-1] + 1)] else tuple(frames)
