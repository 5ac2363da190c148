"""Which frames of which stories are drawn together, and what becomes of them."""

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Final

from storyadapter.method.errors import RunError
from storyadapter.runtime.batches import Batch, BatchDone, BatchLost, FrameDone, OutOfMemory, Report, StepDone
from storyadapter.runtime.jobs import BatchKey, Task
from storyadapter.runtime.story_source import StorySource

TRIES: Final = 3  # of a batch, each on a worker that is lost


class Scheduler:
    """Forms batches from ready tasks of any stories.

    The story for which the least was drawn so far comes first, its next task decides the batch key, and the batch is
    filled with tasks of that key, each time from the story for which the least was drawn: so no story waits for ever. A
    story that has the device for itself is split evenly instead, in the same way whenever it is drawn. Of equal jobs of
    two stories one is drawn: the other's task waits for its frame.

    Attributes:
        sources: the stories that aren't finished, in the order in which they came.
        given: frames in all batches so far, and how many there was room for.
    """

    def __init__(self) -> None:
        self.sources: list[StorySource] = []
        self.given = (0, 0)
        self._shared = False  # whether there was more than one story since there was none
        self._halved: dict[tuple[Hashable, BatchKey], int] = {}
        # by the job's key: the task that a worker has, and those of other stories that wait for its frame
        self._drawing: dict[str, tuple[Task, list[Task]]] = {}

    def add(self, source: StorySource) -> None:
        """A story joins; it has no claim on what was drawn for others before."""
        source.served = min((other.served for other in self.sources), default=0.0)
        self.sources.append(source)
        self._shared = self._shared or len(self.sources) > 1

    def remove(self, source: StorySource) -> None:
        """A story is finished, failed or cancelled: nothing more of it is drawn."""
        self.sources.remove(source)
        self._release([task for task, _ in self._drawing.values() if task.owner is source])
        if not self.sources:
            self._shared = False
            self._halved.clear()

    def next_batch(self, worker: Hashable = None) -> Batch | None:
        """The batch that a worker draws next; None while no task is ready."""
        for drawing in self._drawing:
            self._join(drawing)
        waiting = [source for source in self.sources if source.ready and not source.is_saving]
        if not waiting:
            return None
        leader = min(waiting, key=lambda source: source.served)
        key = leader.ready[0].job.batch_key
        capacity = room = self._capacity(leader, worker, key)
        tasks: list[Task] = []
        members = [leader]
        if not self._shared:
            capacity = leader.next_size(capacity)
        while len(tasks) < capacity:
            fitting = [source for source in waiting if source.ready and source.ready[0].job.batch_key == key]
            if not fitting:
                break
            source = min(fitting, key=lambda source: source.served)
            if source not in members:
                capacity = min(capacity, self._capacity(source, worker, key))
                if len(tasks) >= capacity:
                    break
                members.append(source)
            task = source.take()
            tasks.append(task)
            source.served += task.job.cost / source.share
            if self._drawing.setdefault(task.job.key, (task, []))[0] is task:
                self._join(task.job.key)
        self.given = (self.given[0] + len(tasks), self.given[1] + room)
        # frames of one story lie side by side
        tasks.sort(key=lambda task: members.index(task.owner))
        decode = [source.batching.decode_frames for source in members]
        keep = [source.texts if source.batching.keep_text else 0 for source in members]
        return Batch(tuple(tasks), min((size for size in decode if size), default=None), min(keep))

    def take(self, report: Report, worker: Hashable = None) -> None:
        """Hand what a worker tells to the stories that it is about; what is about those that are gone is dropped."""
        match report:
            case StepDone():
                for source, tasks in self._owners(report.batch.tasks):
                    source.step_done(tasks, report)
            case FrameDone():
                for source, tasks in self._owners((report.decoded.task, *self._waiting((report.decoded.task,)))):
                    for task in tasks:
                        source.frame_done(replace(report.decoded, task=task))
            case BatchDone():
                if report.crowded and len(report.batch.tasks) > 1:
                    self._halve(report.batch, worker)
                waiting = self._waiting(report.batch.tasks, end=True)
                for source, tasks in self._owners(report.batch.tasks):
                    share = len(tasks) / len(report.batch.tasks)
                    source.batch_done(tasks, {stage: share * time for stage, time in report.seconds.items()})
                for source, tasks in self._owners(waiting):
                    source.batch_done(tasks, {})
            case OutOfMemory():
                self._out_of_memory(report, worker)
            case BatchLost():
                self._lost(report)

    def _join(self, key: str) -> None:
        """Ready tasks of other stories whose frames are being drawn wait for them."""
        drawn, waiting = self._drawing[key]
        for source in self.sources:
            if source is not drawn.owner:
                waiting += source.take_equal(drawn)

    def _waiting(self, tasks: Iterable[Task], *, end: bool = False) -> list[Task]:
        """Those that wait for the frames of these; with `end`, nobody is to wait for them any more."""
        found = []
        for task in tasks:
            drawn, waiting = self._drawing.get(task.job.key, (None, []))
            if drawn is task:
                found += waiting
                if end:
                    del self._drawing[task.job.key]
        return found

    def _release(self, tasks: Iterable[Task]) -> None:
        """These won't be drawn, or not yet: what waited for them comes again."""
        for source, waiting in self._owners(self._waiting(tasks, end=True)):
            source.give_back(waiting)

    def _out_of_memory(self, report: OutOfMemory, worker: Hashable) -> None:
        self._release(report.tasks)
        for source, tasks in self._owners(report.tasks):
            if report.final or tasks[0].alone:
                source.fail(report.error)
            else:
                source.give_back([task.again(alone=len(report.tasks) == 1) for task in tasks])
        if len(report.tasks) > 1 and not report.final:
            self._halve(report.batch, worker)

    def _lost(self, report: BatchLost) -> None:
        self._release(report.batch.tasks)
        for source, tasks in self._owners(report.batch.tasks):
            tries = 1 + max(task.lost for task in tasks)
            if tries < TRIES:
                source.give_back_batch([replace(task, lost=tries) for task in tasks])
                continue
            reason = str(report.error).partition("\n")[0]
            place = f"iteration {tasks[0].iteration}, frames {', '.join(str(task.frame) for task in tasks)}"
            source.fail(RunError(f"{place}: {tries} workers were lost that drew them, the last with: {reason}"))

    def _halve(self, batch: Batch, worker: Hashable) -> None:
        most = -(-len(batch.tasks) // 2)
        self._halved[worker, batch.tasks[0].job.batch_key] = most
        for source, tasks in self._owners(batch.tasks):
            source.halved(tasks, most)

    def _capacity(self, source: StorySource, worker: Hashable, key: BatchKey) -> int:
        return min(source.batching.max_frames, self._halved.get((worker, key), source.batching.max_frames))

    def _owners(self, tasks: Iterable[Task]) -> list[tuple[StorySource, list[Task]]]:
        """The stories of some tasks that are still there, each with its own."""
        groups: dict[StorySource, list[Task]] = {}
        for task in tasks:
            groups.setdefault(task.owner, []).append(task)
        return [(owner, group) for owner, group in groups.items() if owner in self.sources and owner.error is None]
