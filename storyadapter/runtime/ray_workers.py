"""Workers as Ray actors, one for each device, on this machine or on those of a cluster.

The driver keeps scheduler, stories and files; an actor opens the engine of its own machine's store. A batch goes to it
with the embeddings that it refers to, and pictures and embeddings come back. An actor that dies is replaced, and what
it was drawing is drawn again, see `Scheduler`.
"""

import io
import itertools
import logging
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

import ray
import torch
from PIL import Image
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from storyadapter.method.errors import RunError, StoryAdapterError
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.model.networks import Networks
from storyadapter.runtime.batches import Batch, BatchDone, BatchLost, OutOfMemory, Report
from storyadapter.runtime.decoding import POLL_SECONDS
from storyadapter.runtime.jobs import Task
from storyadapter.runtime.pipeline import StoryPipeline
from storyadapter.runtime.story_source import StorySource

_TOLD_AFTER: Final = 0.02  # seconds that an actor waits for its last frames, before it may be given a batch
_STARTS: Final = 3  # in a row that fail, until a worker isn't started again
_log = logging.getLogger(__name__)


class _Owner:
    """Stands for a story, of which an actor knows nothing else."""


@dataclass(frozen=True, eq=False)
class _Answer:
    """What an actor tells: `reports` is pickled, batches and their tasks by number."""

    reports: bytes
    is_free: bool
    is_idle: bool


class _Pickler(pickle.Pickler):
    """Writes those objects by number that the other side has."""

    def __init__(self, file: io.BytesIO, number: Callable[[object], object | None]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._number = number

    def persistent_id(self, found: object) -> object | None:
        return self._number(found)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, find: Callable[[Any], object]) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find

    def persistent_load(self, number: Any) -> object:
        return self._find(number)


def _pickled(value: object, number: Callable[[object], object | None]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, number).dump(value)
    return file.getvalue()


class Actor:
    """A pipeline and its worker in a process of their own."""

    def __init__(self, open_pipeline: Callable[[], StoryPipeline], cores: int) -> None:
        torch.set_num_threads(cores)
        self._open_pipeline = open_pipeline
        self._owners: WeakValueDictionary[int, _Owner] = WeakValueDictionary()
        self._numbers: WeakKeyDictionary[Batch | Task, object] = WeakKeyDictionary()

    def process(self) -> int:
        """The number of its process; told as soon as it has a device."""
        return os.getpid()

    def open(self) -> tuple[Networks, str, ModelSampling, int]:
        """What is known of its networks, its model's key, how that is sampled, and its process."""
        self._pipeline = self._open_pipeline()
        self._worker = self._pipeline.worker()
        pipeline = self._pipeline
        return pipeline.networks.description(), pipeline.model, pipeline.sampling, self.process()

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of the pipeline; only where the worker is idle."""
        return getattr(self._pipeline, method)(*arguments)

    def embed(self, pictures: Sequence[Image.Image], groups: Sequence[range] | None) -> Tensor:
        return self._worker.embed(pictures, groups)

    def work(self, number: int, batch: bytes | None, cancelled: Sequence[int]) -> _Answer:
        """Begin with a batch, if there is one, and go on until there is something to tell, or room for another."""
        worker = self._worker
        for owner in cancelled:
            if owner in self._owners:
                worker.cancel(self._owners[owner])
        if batch is not None:
            self._start(number, _Unpickler(batch, lambda story: self._owners.setdefault(story, _Owner())).load())
        had_room, started = worker.is_free, time.monotonic()
        while True:
            reports = worker.advance()
            if reports or worker.is_idle or (worker.is_free and not had_room):
                break
            if had_room and time.monotonic() - started > _TOLD_AFTER:
                break
            time.sleep(POLL_SECONDS)
        number_of = self._numbers.get
        told = _pickled(reports, lambda found: number_of(found) if isinstance(found, Batch | Task) else None)
        return _Answer(told, worker.is_free, worker.is_idle)

    def _start(self, number: int, batch: Batch) -> None:
        self._numbers[batch] = number
        for index, task in enumerate(batch.tasks):
            self._numbers[task] = (number, index)
        self._worker.start(batch)


def first_line(error: BaseException) -> str:
    """What Ray tells of a death, without its pages of advice."""
    return str(error).partition("\n")[0]


class RayWorker:
    """An actor as the one loop sees it; where it dies, another takes its place.

    Args:
        begin: starts an actor.
        accept: is given what an actor tells when it is ready; raises StoryAdapterError where it doesn't fit.

    Attributes:
        process: its number on its machine; None until it is ready.
        restarts: how often it was begun again.
        error: why it isn't started any more.
    """

    def __init__(self, begin: Callable[[], Any], accept: Callable[[Networks, str, ModelSampling], None]) -> None:
        self.process: int | None = None
        self.restarts = 0
        self.error: BaseException | None = None
        self._begin = begin
        self._accept = accept
        self._failed = 0
        self._next: int | None = None  # the batch that is to be sent
        self._call: Any = None  # what the actor is doing
        self._owners: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._batch_numbers = itertools.count()
        self._story_numbers = itertools.count()
        self._start_actor()

    @property
    def is_ready(self) -> bool:
        """Whether it has opened its engine."""
        return self.process is not None

    @property
    def has_begun(self) -> bool:
        """Whether there is its process; before, it may wait until a device of the cluster is free."""
        return self.is_ready or bool(ray.wait([self._begun], timeout=0)[0])

    @property
    def is_free(self) -> bool:
        return self.is_ready and self._has_room and self._call is None and self._next is None

    @property
    def is_idle(self) -> bool:
        return not self._under_way

    def start(self, batch: Batch) -> None:
        number = self._next = next(self._batch_numbers)
        self._under_way[number] = batch
        self._has_room = False

    def advance(self) -> list[Report]:
        """Raises RunError: it isn't started any more."""
        if self.error is not None:
            raise RunError(f"no worker is left; the last: {self.error}") from self.error
        reports: list[Report] = []
        if self._call is not None and ray.wait([self._call], timeout=0)[0]:
            call, self._call = self._call, None
            try:
                answer = ray.get(call)
                reports = self._read(answer) if self.is_ready else self._ready(*answer)
            except (RayError, StoryAdapterError) as error:
                return self._lost(error.cause if isinstance(error, RayTaskError) else error)
        if self._call is None and self.is_ready and (self._next is not None or (self._under_way and not reports)):
            self._send()
        return reports

    def embed(self, pictures: Sequence[Image.Image], groups: Sequence[range] | None = None) -> Tensor:
        return self.get(self._actor.embed.remote(list(pictures), groups))

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of its pipeline, for `get`; only where it is ready and idle."""
        return self._actor.ask.remote(method, *arguments)

    @staticmethod
    def get(call: Any) -> Any:
        """What comes of a call; errors as they were raised there. Raises RunError: the actor died."""
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise RunError(f"a worker was lost: {first_line(error)}") from error

    def cancel(self, owner: object) -> None:
        if owner in self._owners:
            self._cancelled.append(self._owners[owner])

    def close(self) -> None:
        for owner in list(self._owners):
            self.cancel(owner)

    def stop(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def _start_actor(self) -> None:
        self.process = None
        self._under_way: dict[int, Batch] = {}
        self._cancelled: list[int] = []
        self._next = None
        self._has_room = True
        self._actor = self._begin()
        self._begun = self._actor.process.remote()
        self._call = self._actor.open.remote()

    def _ready(self, networks: Networks, model: str, sampling: ModelSampling, process: int) -> list[Report]:
        self._accept(networks, model, sampling)
        self.process = process
        self._failed = 0
        return []

    def _send(self) -> None:
        number, batch = self._next, None
        if number is not None:
            batch = _pickled(self._under_way[number], self._number_of_story)
        self._call = self._actor.work.remote(number, batch, self._cancelled)
        self._next, self._cancelled = None, []

    def _number_of_story(self, found: object) -> int | None:
        if not isinstance(found, StorySource):
            return None
        if found not in self._owners:
            self._owners[found] = next(self._story_numbers)
        return self._owners[found]

    def _read(self, answer: _Answer) -> list[Report]:
        reports: list[Report] = _Unpickler(answer.reports, self._find).load()
        self._has_room = answer.is_free
        ended = {id(report.batch) for report in reports if isinstance(report, BatchDone | OutOfMemory)}
        keep = {} if answer.is_idle else self._under_way
        self._under_way = {number: batch for number, batch in keep.items() if id(batch) not in ended}
        return reports

    def _find(self, number: int | tuple[int, int]) -> Batch | Task:
        if isinstance(number, int):
            return self._under_way[number]
        return self._under_way[number[0]].tasks[number[1]]

    def _lost(self, error: BaseException) -> list[Report]:
        """Its batches come to nothing, and another actor is begun, unless that has failed too often."""
        lost: list[Report] = [BatchLost(batch, error) for batch in self._under_way.values()]
        self._failed += not self.is_ready
        ray.kill(self._actor)
        _log.warning("a worker was lost: %s", first_line(error))
        if self._failed == _STARTS or (not self.is_ready and isinstance(error, StoryAdapterError)):
            self._under_way, self.process, self.error = {}, None, error
            return lost
        self.restarts += 1
        self._start_actor()
        return lost
