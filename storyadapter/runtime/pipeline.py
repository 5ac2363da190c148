"""One story after the other: the simple face of the runtime. Imports no backend."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace
from functools import partial

import psutil
import torch

from storyadapter.method.control import ControlSettings
from storyadapter.method.control_pictures import Controls, read_controls
from storyadapter.method.errors import Field, InputError
from storyadapter.method.events import Event
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.plan import RunPlan, split_evenly
from storyadapter.method.sampler import sampler_of
from storyadapter.method.story import Story
from storyadapter.model.contract import Range
from storyadapter.model.networks import Networks, idle_inputs
from storyadapter.model.tokenizer import TextTokenizer
from storyadapter.runtime.batches import BatchWorker
from storyadapter.runtime.conditioning import TEXTS_AT_ONCE, Tokenizers
from storyadapter.runtime.denoising import StatePool
from storyadapter.runtime.drive import drive
from storyadapter.runtime.frame_store import FrameStore
from storyadapter.runtime.given_pictures import FramePictures, Pictures, pictures_of_frames
from storyadapter.runtime.memory import Batching, Batchings, choose_batching, step_networks, unet_letters
from storyadapter.runtime.story_jobs import CUT, in_chunks, most_chunks
from storyadapter.runtime.story_source import FinishedIteration, StorySource
from storyadapter.runtime.worker import Worker

_SLOW_CALL = 5.0  # seconds
_UNSAID = ModelSampling()


class Pipeline(ABC):
    """Draws stories of one model, here or on workers elsewhere.

    It is for one thread at a time: a story is drawn where its events are asked for. For many stories, or many threads,
    give it to a `LocalExecutor`, all of whose methods may be called from any thread.

    >>> story = Story.from_prompts(["a red fox is reading a book", "a red fox is running at night"])
    >>> for event in storyadapter.open().run(story, RunPlan(seed=7)):
    ...     print(event)

    Attributes:
        networks: of the model; of workers elsewhere only what is known of them.
        tokenizers: of the same checkpoint.
        model: key of the model's files, which becomes part of the keys of what is drawn.
        sampling: what the model says of its own sampling, which decides what a plan leaves open.
        worker_count: devices that draw; an iteration is split so that all of them end together.
    """

    networks: Networks
    tokenizers: Tokenizers
    model: str
    sampling: ModelSampling
    worker_count: int = 1
    _batchings: Batchings

    @property
    def restarts(self) -> int:
        """Workers that were lost and begun again."""
        return 0

    def run(
        self,
        story: Story,
        plan: RunPlan | None = None,
        *,
        style: str | None = None,
        references: Mapping[str, Pictures] | None = None,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
        cancel: threading.Event | None = None,
        controls: Controls | None = None,
    ) -> Generator[Event, None, None]:
        """Draw a story, iteration by iteration.

        It may be stopped at any time: by `close()` where the events are asked for, by `cancel` from anywhere else.

        >>> stop = threading.Event()
        >>> for event in pipeline.run(story, plan, cancel=stop):  # stop.set() in another thread ends it
        ...     print(event)

        Args:
            story: prompts, characters and style.
            plan: every other setting; by default the published ones. Its size, if it has none, is the model's own.
            style: overrides the story's style.
            references: pictures, or files of them, by the name of whom they show, beside those that the story names:
                frames whose prompt has the name attend to them, see `plan.reference_scale` and `keep_references`.
            resume: go on after this finished iteration; the pictures are those of an uninterrupted run.
            store: keeps frames; what it has already isn't drawn again.
            cancel: set from any thread, it ends the run before its next step.
            controls: the story's control pictures, where they were read before.

        Yields:
            Events; `FrameFinished` carries the pictures.

        Raises:
            InputError: before the first event, where the engine can't serve the plan, or `resume` is of another story.
            RunError: a frame came out with values that aren't finite, or can't be kept.
            concurrent.futures.CancelledError: `cancel` was set.
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        plan = self.decided(plan or RunPlan())
        pictures = self.check(story, plan, style, references=references, resume=resume)
        controls = read_controls(story, plan) if controls is None else controls

        def events() -> Generator[Event, None, None]:
            self.use_device()
            source = self.source(story, plan, style, pictures, resume, store, controls)
            with closing(drive(self.workers(), [source])) as driven:
                for _, event in driven:
                    if cancel is not None and cancel.is_set():
                        raise CancelledError
                    yield event

        return events()

    def check(
        self,
        story: Story,
        plan: RunPlan,
        style: str | None = None,
        *,
        references: Mapping[str, Pictures] | None = None,
        resume: FinishedIteration | None = None,
    ) -> FramePictures:
        """Tell what can be told of a request before anything is drawn; gives the pictures that its frames attend to.

        Args:
            plan: with everything decided, see `decided`.

        Raises:
            InputError: the engine can't serve it, the sampler can't do it, `resume` is of another story, or a picture
                can't be read.
        """
        count = len(self.networks.geometry.controls)
        if not count and any(frame.control for frame in story.frames):  # before a file is read that a story names
            expected = (Field("controlnet"), " with it")
            raise InputError("the story has control pictures, and there is no ControlNet", expected=expected)
        pictures = pictures_of_frames(story, references)
        frames = in_chunks(story.final_frames(plan, style), plan, self.tokenizers)
        check_request(
            self.networks, plan, frames=len(frames), pictures=max(map(len, pictures)), chunks=most_chunks(frames)
        )
        _check_resumed(story, plan, resume)
        return pictures

    def decided(self, plan: RunPlan) -> RunPlan:
        """The plan with everything decided that it leaves to the model: its size, how it is sampled and decoded, and
        how its ControlNets are used."""
        geometry = self.networks.geometry
        plan = plan.sized(geometry.default_pixels).for_model(self.sampling)
        controls = plan.controls or (ControlSettings(),) * len(geometry.controls)
        return replace(plan, controls=controls, reference_vae=geometry.reference_vae)

    def source(
        self,
        story: Story,
        plan: RunPlan,
        style: str | None = None,
        pictures: FramePictures | None = None,
        resume: FinishedIteration | None = None,
        store: FrameStore | None = None,
        controls: Controls | None = None,
    ) -> StorySource:
        """A story's frames as jobs, for a scheduler; `check` comes before.

        Args:
            pictures: of `pictures_of_frames`; by default those that the story names.
        """
        plan, letters = self.decided(plan), self.networks.letters
        pictures = pictures_of_frames(story) if pictures is None else pictures
        frames = [
            replace(frame, references=tuple(picture.key for picture in of_frame))
            for frame, of_frame in zip(story.final_frames(plan, style), pictures, strict=True)
        ]
        frames = in_chunks(frames, plan, self.tokenizers)
        return StorySource(
            frames,
            plan,
            controls=read_controls(story, plan) if controls is None else controls,
            model=self.model,
            numerics=self.networks.numerics,
            tokenizers=self.tokenizers,
            batching=self.batching(plan, len(frames), len(story.negative_prompts(plan)), most_chunks(frames)),
            texts_at_once=min(TEXTS_AT_ONCE, letters["P"].maximum) if letters else TEXTS_AT_ONCE,
            workers=self.worker_count,
            pictures={picture.key: picture.picture for of_frame in pictures for picture in of_frame},
            resume=resume,
            store=store,
        )

    @abstractmethod
    def workers(self) -> Callable[[], Sequence[BatchWorker]]:
        """For one loop; only one may go on at a time. It asks again each turn who is there: workers come and go."""

    @abstractmethod
    def use_device(self) -> None:
        """Make the GPU that the networks were opened on the calling thread's current one; each thread has its own."""

    def batching(self, plan: RunPlan, frames: int, negatives: int = 1, chunks: int = 1) -> Batching:
        """How a story of so many frames and distinct negative prompts, of so many chunks at most, is split.

        On a GPU this follows from the memory that is free, measured once per pipeline and size of story, so that a
        story that is drawn again is split as before; of several workers, that with the least room decides.

        Raises:
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        return self._batchings.take(self.decided(plan), frames, negatives, chunks)

    def knows_batching(self, plan: RunPlan, frames: int, negatives: int = 1, chunks: int = 1) -> bool:
        """Whether `batching` needs no measurement, which nothing else may go on beside."""
        on_gpu = self.networks.device.type == "cuda"
        return not on_gpu or self._batchings.is_known(self.decided(plan), frames, negatives, chunks)

    @abstractmethod
    def seconds_per_row(self, plan: RunPlan, frames: int, references: int) -> float:
        """Seconds of one row of a UNet call with so many frames and references, of all workers together."""

    @abstractmethod
    def memory_in_use(self) -> int:
        """Bytes held now: of GPUs by tensors, or of the processes themselves on a CPU."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what doesn't end with this process."""


class StoryPipeline(Pipeline):
    """Draws stories on one device of this process. Between runs it keeps nothing but buffers, so that equal shapes find
    the same memory again.

    Args:
        networks: of one model, from `storyadapter.engine.opening.open_networks`.
        tokenizers: of text encoder 1 and 2 of the same checkpoint, from `Checkpoint.load_tokenizers`.
        model: key of the model's files, which becomes part of the keys of what is drawn.
        sampling: what the model says of its own sampling, which decides what a plan leaves open.
        overlapped: whether decoding and what follows on it go on beside the UNet's work on the next batch; by default
            on a GPU alone, as there is nothing to gain on a CPU.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizers: tuple[TextTokenizer, TextTokenizer],
        *,
        model: str = "",
        sampling: ModelSampling = _UNSAID,
        overlapped: bool | None = None,
    ) -> None:
        self.networks = networks
        self.tokenizers = Tokenizers(*tokenizers)
        self.model = model
        self.sampling = replace(sampling, embeds_guidance=bool(networks.geometry.guidance_embedding))
        self.overlapped = overlapped
        self._gpu = torch.cuda.current_device() if networks.device.type == "cuda" else None
        self._states = StatePool(networks)
        self._batchings = Batchings(partial(choose_batching, networks, self._states))

    def use_device(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def worker(self) -> Worker:
        """A worker on these networks; only one may be at work at a time."""
        return Worker(self.networks, self.tokenizers, self._states, overlapped=self.overlapped)

    def workers(self) -> Callable[[], Sequence[BatchWorker]]:
        worker = self.worker()
        return lambda: (worker,)

    def close(self) -> None:
        """Nothing to do."""

    def seconds_per_row(self, plan: RunPlan, frames: int, references: int) -> float:
        """Seconds of one row of a UNet call with so many frames and references, from one call after a warm-up.

        Good enough to tell a user how long a run will take; measurements are made by `storyadapter.bench`. Where a call
        takes so long that warming up hardly counts, the warm-up is what is timed.
        """
        while True:
            try:
                return self._timed_call(plan, frames, references)
            except torch.OutOfMemoryError:
                if frames == 1:
                    raise
            frames = -(-frames // 2)  # as a run does then

    def memory_in_use(self) -> int:
        """Bytes held now: of the GPU by this process's tensors, or of the process itself on a CPU."""
        if self.networks.device.type == "cuda":
            return torch.cuda.memory_allocated(self.networks.device)
        return psutil.Process().memory_info().rss

    def _timed_call(self, plan: RunPlan, frames: int, references: int) -> float:
        networks = self.networks
        letters = unet_letters(networks, plan, frames, references)
        inputs = {name: idle_inputs(networks, name, letters) for name in step_networks(networks)}
        seconds = 0.0
        for _ in ("warm-up", "call"):
            start = time.perf_counter()
            for name, values in inputs.items():
                networks[name](values)
            if networks.device.type == "cuda":
                torch.cuda.synchronize(networks.device)
            seconds = time.perf_counter() - start
            if seconds > _SLOW_CALL:
                break
        return seconds / letters["B"]


def check_request(networks: Networks, plan: RunPlan, *, frames: int, pictures: int = 0, chunks: int = 1) -> None:
    """Whether an engine and the sampler can do a plan.

    Args:
        frames: of the story.
        pictures: of a user's, that one frame attends to at the most.
        chunks: of the longest text.

    Raises:
        InputError: they can't.
    """
    letters, scale = networks.letters, networks.geometry.pixels_per_latent
    if letters is not None:
        height, width = (Range(letters[name].minimum * scale, letters[name].maximum * scale) for name in ("h", "w"))
        references = Range(1, letters["N"].maximum - 1)  # N counts the unconditional one too
        together = 1 if plan.max_frames is None else len(split_evenly(frames, plan.max_frames)[0])
        for name, what, asked, built in (
            ("max_frames", "", together, letters["F"]),
            ("max_references", "the story's frames and pictures", plan.references(frames, pictures), references),
            ("max_prompt_chunks", "the longest prompt's chunks", chunks, letters["M"]),
            ("height", "", plan.size[0], height),
            ("width", "", plan.size[1], width),
        ):
            if asked not in built:
                named = (f"{what} (", Field(name), ")") if what else (Field(name),)
                served = f"this engine was built for {built.minimum} to {built.maximum}"
                cut = ("; ", CUT) if name == "max_prompt_chunks" else ""
                raise InputError(*named, f": {asked} asked for", advice=(served, cut))
    if len(plan.controls) != (count := len(networks.geometry.controls)):
        found = f"there are settings for {len(plan.controls)} ControlNets"
        raise InputError(found, expected=f"{count}, as many as the model has", field="controlnet")
    for iteration in range(plan.iterations):
        sampler_of(plan.sampler_in(iteration))


def _check_resumed(story: Story, plan: RunPlan, resume: FinishedIteration | None) -> None:
    if resume is not None and len(resume.pictures) != len(story.frames):
        found = f"a finished iteration has {len(resume.pictures)} pictures"
        raise InputError(found, expected=f"the story's {len(story.frames)}")
    if resume is not None and plan.strength < 1:
        found = f" {plan.strength:g} starts from latents, and pictures alone were given to go on from"
        raise InputError(Field("strength"), found, expected=(Field("strength"), " 1"))
