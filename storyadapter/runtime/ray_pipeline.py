"""Stories on Ray: as many workers as there are devices, on this machine or in a cluster."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import psutil
import ray
import torch

from storyadapter.method.errors import Field, InputError, RunError, StoryAdapterError
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.plan import RunPlan
from storyadapter.model.networks import Networks
from storyadapter.runtime.batches import BatchWorker
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.decoding import POLL_SECONDS
from storyadapter.runtime.memory import Batching, Batchings
from storyadapter.runtime.pipeline import Pipeline, StoryPipeline
from storyadapter.runtime.ray_workers import Actor, RayWorker

_CORES: Final = 4  # of a worker without a GPU, on a cluster whose size says nothing else
_NEW_DEVICES_EVERY: Final = 5.0  # seconds
_WAITS_SILENTLY: Final = 15.0  # seconds for the first worker
_OBJECTS: Final = 1 << 30  # bytes of pictures on their way


class RayPipeline(Pipeline):
    """Draws stories on Ray actors; use it in a `with` statement, or `close` it.

    Args:
        open_pipeline: opens the engine where it is called: it is pickled and called in every actor.
        tokenizers: of the same checkpoint.
        workers: how many; by default one for each GPU of the cluster, and for what joins it.
        address: of a running Ray cluster; by default Ray is started on this machine, on its loopback address alone.
        on_wait: called with one line when no worker could begin for a while, as where no device is free.

    Raises:
        InputError: no cluster answers at the address.
        StoryAdapterError: what `open_pipeline` raises in every actor.
        RunError: no actor could be started.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], StoryPipeline],
        tokenizers: Tokenizers,
        *,
        workers: int | None = None,
        address: str | None = None,
        on_wait: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.tokenizers = tokenizers
        self._on_wait = on_wait
        self._waits_since: float | None = None  # since when there is no worker's process; infinity: it was told
        self._open_pipeline = open_pipeline
        self._asked = workers
        self._batchings = Batchings(self._least)
        self._has_networks = False
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(workers, address)
        self._options, self._cores = _share_of(workers)
        self._workers: list[RayWorker] = []
        self._looked = -_NEW_DEVICES_EVERY
        try:
            while not any(worker.is_ready for worker in self._current()):
                for worker in self._workers:
                    worker.advance()
                    if isinstance(worker.error, StoryAdapterError):
                        raise worker.error
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def restarts(self) -> int:
        """Workers that were lost and begun again."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def processes(self) -> list[int]:
        """Of the workers that are ready, each on its machine."""
        return [worker.process for worker in self._workers if worker.process is not None]

    def wait_for_all(self) -> None:
        """Wait until all are ready; the first is from the start. Raises RunError: there are none any more."""
        while not all(worker.is_ready for worker in self._current()):
            for worker in self._workers:
                worker.advance()
            time.sleep(POLL_SECONDS)

    def use_device(self) -> None:
        """Nothing to do: every actor has its own."""

    def workers(self) -> Callable[[], Sequence[BatchWorker]]:
        return self._current

    def seconds_per_row(self, plan: RunPlan, frames: int, references: int) -> float:
        seconds = self._ask_all("seconds_per_row", plan, frames, references)
        return 1 / sum(1 / each for each in seconds)

    def memory_in_use(self) -> int:
        return sum(self._ask_all("memory_in_use"))

    def close(self) -> None:
        """End the actors, and Ray where this has started it."""
        for worker in self._workers:
            worker.stop()
        if self._is_ours:
            ray.shutdown()

    def _least(self, plan: RunPlan, frames: int, negatives: int, chunks: int) -> Batching:
        """The batching of the worker that has the least room."""
        found: list[Batching] = self._ask_all("batching", plan, frames, negatives, chunks)
        return min(found, key=lambda batching: (batching.max_frames, batching.keep_text))

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """What all workers say that are there; RunError where none is."""
        calls = [worker.ask(method, *arguments) for worker in self._workers if worker.is_ready]
        told, lost = [], RunError("no worker is ready")
        for call in calls:
            try:
                told.append(RayWorker.get(call))
            except RunError as error:
                lost = error
        if not told:
            raise lost
        return told

    def _current(self) -> Sequence[RayWorker]:
        if self._looked + _NEW_DEVICES_EVERY < time.monotonic():
            self._looked = time.monotonic()
            wanted = self._asked or max(1, _places(self._options))
            while len(self._workers) < wanted:
                self._workers.append(RayWorker(self._begin, self._accept))
            self.worker_count = wanted
            self._tell_if_waiting()
        return [worker for worker in self._workers if worker.error is None] or self._workers[-1:]

    def _tell_if_waiting(self) -> None:
        now = time.monotonic()
        if any(worker.has_begun for worker in self._workers):
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > _WAITS_SILENTLY:
            name, each = _kind(self._options)
            there, free = (int(told().get(name, 0)) for told in (ray.cluster_resources, ray.available_resources))
            free_now = f"{free} of the cluster's {there} {name}s are free"
            self._on_wait(f"no worker could begin yet: each takes {each:g} {name}, and {free_now}; waiting")
            self._waits_since = math.inf

    def _begin(self) -> Any:
        actor = ray.remote(**self._options, max_restarts=0, scheduling_strategy="SPREAD")(Actor)
        return actor.remote(self._open_pipeline, self._cores)

    def _accept(self, networks: Networks, model: str, sampling: ModelSampling) -> None:
        if not self._has_networks:
            self.networks, self.model, self.sampling, self._has_networks = networks, model, sampling, True
        for name, found, expected in (
            ("model", model, self.model),
            ("precision", networks.numerics, self.networks.numerics),
            ("backend", networks.backend, self.networks.backend),
            ("max_frames", networks.letters, self.networks.letters),
        ):
            if found != expected:
                raise InputError("a worker has another ", Field(name), f": {found}", expected=str(expected))


def _connect(workers: int | None, address: str | None) -> None:
    """Start Ray here, or join a cluster; SIGTERM stays with whoever has it, as Ray would take it."""
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        _begin_ray(workers, address)
    finally:
        if terminate is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)


def _begin_ray(workers: int | None, address: str | None) -> None:
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(Field("ray"), f": no cluster at {address}: {error}") from error
        return
    gpus = torch.cuda.device_count()
    if gpus and workers and workers > gpus:
        raise InputError(Field("workers"), f" is {workers}", expected=f"at most the {gpus} GPUs of this machine")
    ray.init(
        address="local",
        num_cpus=max(workers or 1, psutil.cpu_count(logical=False) or 1),
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=_OBJECTS,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _share_of(workers: int | None) -> tuple[dict[str, float], int]:
    """What each worker asks of its machine, and its cores."""
    cluster = ray.cluster_resources()
    if cluster.get("GPU"):
        return {"num_gpus": 1, "num_cpus": 1}, 1
    smallest = min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
    cores = max(1, int(cluster["CPU"]) // workers) if workers else min(_CORES, smallest)
    return {"num_cpus": min(cores, smallest)}, min(cores, smallest)


def _kind(options: dict[str, float]) -> tuple[str, float]:
    """Which resource of a cluster a worker takes, and how many."""
    return ("GPU", 1.0) if "num_gpus" in options else ("CPU", options["num_cpus"])


def _places(options: dict[str, float]) -> int:
    name, each = _kind(options)
    return int(ray.cluster_resources().get(name, 0) // each)
