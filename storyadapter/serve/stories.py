"""The life of accepted stories: they wait, are drawn together, and end once; a restarted server goes on with them."""

import asyncio
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Final

from storyadapter.method.errors import InputError, StoryAdapterError, said
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
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.output.edits import Edit
from storyadapter.output.files import is_full
from storyadapter.output.run_folder import RunFolder
from storyadapter.output.run_record import json_values, refuse_another
from storyadapter.runtime.executor import LocalExecutor, SubmittedStory
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.folders import identity_of, open_folder
from storyadapter.serve.limits import DAY, Limits
from storyadapter.serve.metrics import Metrics
from storyadapter.serve.progress import Progress
from storyadapter.serve.queue import Priority, QueuedStory, StoryEvent, StoryQueue
from storyadapter.serve.uploads import Uploads

_SHARE: Final[Mapping[Priority, int]] = {"interactive": 4, "batch": 1}
_FULL_AGAIN: Final = 5.0  # seconds until a full disk is tried again
_EXPIRE_EVERY: Final = 3600.0


class Stories:
    """Accepts, draws and removes stories; use it in an `async with` statement.

    Args:
        pipeline: what draws; nobody else may run it.
        folder: holds queue, uploads, and a run folder for each story; of this server alone.
        limits: of the server.
        metrics: are kept up to date.

    Attributes:
        error: why nothing is drawn any more; the server is to be started again then.
        is_paused: whether nothing new begins, as the disk is full.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, limits: Limits, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.queue = StoryQueue(folder / "queue.sqlite")
        self.uploads = Uploads(folder / "uploads", limits.limit_uploads)
        self.metrics = metrics
        self.limits = limits
        self.error: BaseException | None = None
        self.is_paused = False
        self._folder = folder / "stories"
        self._progress: dict[str, Progress] = {}
        self._drawing: dict[str, asyncio.Task[None]] = {}
        self._letting_go: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()

    async def __aenter__(self) -> "Stories":
        known = self.queue.names()
        for path in self._folder.glob("*"):  # of a story that was being removed, or edited, when the last process ended
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        self._executor = LocalExecutor(self.pipeline)
        self._tasks = [asyncio.create_task(self._begin_stories()), asyncio.create_task(self._expire_now_and_then())]
        return self

    async def __aexit__(self, *error: object) -> None:
        """Draw no more; stories that aren't finished stay in the queue."""
        tasks = [*self._tasks, *self._drawing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._letting_go, return_exceptions=True)
        await asyncio.to_thread(self._executor.close)
        self.queue.close()

    def accept(
        self,
        owner: str,
        story: Story,
        plan: RunPlan,
        *,
        style: str | None = None,
        priority: Priority = "interactive",
        idempotency: str | None = None,
        digest: str | None = None,
        name: str | None = None,
        edit_of: str | None = None,
    ) -> QueuedStory:
        """A story whose request was checked; it waits from now on, whatever happens to this process."""
        told = (story.to_dict(), style, plan.as_dict(), idempotency, digest)
        accepted = self.queue.add(owner, priority, *told, name=name, edit_of=edit_of)
        self._wake.set()
        self._count()
        return accepted

    async def edit(
        self,
        of: QueuedStory,
        changes: Mapping[int, Mapping[str, Any]],
        check: Callable[[Story, RunPlan], None],
        *,
        follows: bool,
        priority: Priority,
    ) -> QueuedStory:
        """A new story that has the frames of a finished one, and those that change are drawn again.

        Args:
            check: raises what is wrong with the new story, which names pictures by their ids; then nothing is written.

        Raises:
            InputError: see `Edit.of`; or another model drew the story.
            RunError: no space is left.
        """
        folder, name = self.path(of.id), self.queue.new_name()

        def begin() -> Story:
            edit = Edit.of(folder, changes, follows=follows)
            refuse_another(folder, edit.run.record.identity, json_values(identity_of(self.pipeline, of)))
            check(edit.story, of.settings)
            edit.begin(edit.identity(), self.path(name))
            return edit.story

        try:
            story = await asyncio.to_thread(begin)
        except InputError as error:
            raise InputError(str(error).replace(str(folder), "the story"), field=error.field) from error
        return self.accept(of.owner, story, of.settings, style=of.style, priority=priority, name=name, edit_of=of.id)

    def path(self, name: str) -> Path:
        """The run folder of a story."""
        return self._folder / name

    def progress(self, name: str) -> Progress:
        """Of a story that this process has begun; all zero for others."""
        return self._progress.get(name) or Progress()

    def seconds_left(self, story: QueuedStory) -> float | None:
        """Until it is drawn, if it goes on as it did lately; None where nothing is known."""
        progress, rate = self.progress(story.id), self.metrics.rate()
        if story.state != "in_progress" or not progress.of_rows or not rate:
            return None
        return max(0, progress.of_rows - progress.rows) * max(1, len(self._drawing)) / rate

    async def cancel(self, name: str) -> None:
        """Draw no more of a story; nothing happens to one that is over."""
        self._end(name, "cancelled")
        progress = self._progress.get(name)
        if progress and progress.submitted:
            progress.submitted.cancel()
        if name in self._drawing:
            await asyncio.wait([self._drawing[name]])

    async def remove(self, name: str) -> None:
        """A story, its pictures and its events."""
        await self.cancel(name)
        self.queue.remove(name)
        if name in self._progress:
            self._progress.pop(name).changed.set()
        await asyncio.to_thread(shutil.rmtree, self.path(name), ignore_errors=True)

    async def events(self, name: str, after: int, *, pause: float) -> AsyncIterator[StoryEvent | None]:
        """What happened to a story after an event, up to its end; None after each pause in which nothing did."""
        is_open = self.queue.story(name).is_open
        progress = self._progress.setdefault(name, Progress()) if is_open else Progress()
        while True:
            progress.changed.clear()
            told = self.queue.events(name, after)
            for event in told:
                yield event
                after = event.number
            if told:
                continue
            try:
                if not self.queue.story(name).is_open:
                    return
            except KeyError:
                return
            try:
                await asyncio.wait_for(progress.changed.wait(), pause)
            except TimeoutError:
                yield None

    async def wait(self, name: str) -> QueuedStory:
        """The story once it is over."""
        progress = self._progress.setdefault(name, Progress())
        if self.queue.story(name).is_open:
            await progress.ended.wait()
        return self.queue.story(name)

    def measured(self) -> bytes:
        """The metrics, for Prometheus."""
        self.metrics.memory.set(self.pipeline.memory_in_use())
        self.metrics.restarts.set(self.pipeline.restarts)
        self.metrics.filled(*self._executor.batch_frames)
        return self.metrics.text()

    async def _begin_stories(self) -> None:
        while True:
            self._wake.clear()
            while not self.is_paused and len(self._drawing) < self.limits.limit_active:
                batch = sum(self.progress(name).priority == "batch" for name in self._drawing)
                story = self.queue.next(interactive_only=2 * batch >= self.limits.limit_active)
                if story is None:
                    break
                try:
                    self.queue.begin(story.id)
                except sqlite3.OperationalError:
                    self._pause()
                    break
                self._progress.setdefault(story.id, Progress()).priority = story.priority
                task = asyncio.create_task(self._draw(story))
                self._drawing[story.id] = task
                task.add_done_callback(lambda done, name=story.id: self._drawn(name, done))  # type: ignore[misc]
            self._count()
            await self._wake.wait()

    def _drawn(self, name: str, task: asyncio.Task[None]) -> None:
        del self._drawing[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.error = self.error or error
        self._wake.set()

    async def _draw(self, queued: QueuedStory) -> None:
        name = queued.id
        progress = self._progress.setdefault(name, Progress())
        if not queued.started:
            self.metrics.queued.observe(time.time() - queued.accepted)
        try:
            story, plan = self.uploads.story(queued.owner, queued.story), queued.settings
            folder = await asyncio.to_thread(open_folder, self.path(name), self.pipeline, queued, story)
        except StoryAdapterError as error:
            self._fail(name, error)
            return
        except (ValueError, TypeError) as error:  # pydantic's: the queue holds something else than was accepted
            self._fail(name, InputError(f"it can't be read any more: {said(error)}"))
            return
        submitted = None
        try:
            how: dict[str, Any] = {"style": queued.style, "store": folder, "share": _SHARE[queued.priority]}
            reading = asyncio.ensure_future(asyncio.to_thread(self._executor.submit, story, plan, **how))
            try:
                submitted = progress.submitted = await asyncio.shield(reading)
            except asyncio.CancelledError:
                submitted = await reading
                raise
            if not self.queue.story(name).is_open:  # cancelled meanwhile
                submitted.cancel()
            async for event in submitted:
                if isinstance(event, RunFinished):
                    await asyncio.to_thread(folder.finish, event.seconds, story.prompts, story.title)
                self._note(name, plan, progress, event)
            self._end(name, "completed")
        except CancelledError:
            self._end(name, "cancelled")
        except StoryAdapterError as error:
            if self._executor.error is not None:  # no device is left: the story waits for the next process
                self.error = error
                self.queue.wait_again(name)
            else:
                self._fail(name, error)
        except (RuntimeError, MemoryError, sqlite3.OperationalError) as error:
            if self._executor.error is not None:
                self.error = error
                self.queue.wait_again(name)
            elif isinstance(error, sqlite3.OperationalError):
                self._pause()
                self.queue.wait_again(name)
            else:
                self._fail(name, InputError(f"it can't be drawn here: {error}"))
        finally:
            letting_go = asyncio.ensure_future(asyncio.to_thread(_let_go, submitted, folder))
            self._letting_go.add(letting_go)
            letting_go.add_done_callback(self._letting_go.discard)
            await asyncio.shield(letting_go)

    def _note(self, name: str, plan: RunPlan, progress: Progress, event: Event) -> None:
        """Count an event, and tell it to whoever listens."""
        metrics = self.metrics
        match event:
            case StepFinished():
                rows = len(event.frames) * plan.rows_at(event.iteration, event.step)
                progress.rows += rows
                metrics.drew_rows(rows)
            case RunStarted():
                progress.of_rows = event.rows
                progress.frames += event.first_iteration * event.frames
                self._tell(name, "started", {"frames": event.frames, "iterations": event.iterations})
                self._tell_what_was_missed(name, event)
            case FrameFinished():
                progress.frames += 1
                metrics.frames.inc()
                again = {"decoded_again": event.decoded_again}
                self._tell(name, "frame_finished", {"iteration": event.iteration, "frame": event.frame, **again})
            case IterationStarted():
                for frame in event.found:
                    progress.frames += 1
                    self._tell(name, "frame_found", {"iteration": event.iteration, "frame": frame})
            case IterationFinished():
                for stage, seconds in event.seconds.items():
                    metrics.worked(stage, seconds)
                self.queue.spend(name, sum(event.seconds.values()))
                self._tell(name, "iteration_finished", {"iteration": event.iteration})
            case PromptTruncated():
                self._tell(name, "prompt_truncated", {"frame": event.frame, "words": event.words})
            case MicroBatchHalved():
                self._tell(name, "batch_halved", {"max_frames": event.max_frames})

    def _tell_what_was_missed(self, name: str, run: RunStarted) -> None:
        """Of iterations that were finished before what the last process hadn't told when it ended."""
        told = self.queue.told(name)
        for iteration in range(run.first_iteration):
            for frame in range(run.frames):
                if not told & {("frame_finished", iteration, frame), ("frame_found", iteration, frame)}:
                    self._tell(name, "frame_found", {"iteration": iteration, "frame": frame})
            if ("iteration_finished", iteration, None) not in told:
                self._tell(name, "iteration_finished", {"iteration": iteration})

    def _tell(self, name: str, kind: str, data: Mapping[str, Any]) -> None:
        self.queue.tell(name, kind, data)
        self._changed(name)

    def _fail(self, name: str, error: StoryAdapterError) -> None:
        cause = error.__cause__
        if isinstance(cause, OSError) and is_full(cause):
            self._pause()
            self.queue.wait_again(name)
            return
        self._end(name, "failed", error.as_dict() | {"detail": str(error)})

    def _end(self, name: str, state: Any, error: Mapping[str, Any] | None = None) -> None:
        if self.queue.end(name, state, error) is None:
            return
        story = self.queue.story(name)
        self.metrics.finished.labels(state).inc()
        self.metrics.latency.observe(time.time() - story.accepted)
        self._count()
        self._changed(name)
        if name in self._progress:
            self._progress[name].ended.set()

    def _changed(self, name: str) -> None:
        if name in self._progress:
            self._progress[name].changed.set()

    def _pause(self) -> None:
        """The disk is full: what was accepted waits until there is room."""
        self.is_paused = True

        def go_on() -> None:
            self.is_paused = False
            self._wake.set()

        asyncio.get_running_loop().call_later(_FULL_AGAIN, go_on)

    def _count(self) -> None:
        self.metrics.running.set(self.queue.count("in_progress"))
        self.metrics.waiting.set(self.queue.count("queued"))

    async def expire(self) -> None:
        """Remove what is older than it is kept: stories, and pictures that no story has."""
        before = time.time() - self.limits.retain * DAY
        for name in self.queue.expired(before):
            await self.remove(name)
        for path in list(self.uploads.older(before)):
            if not self.queue.uses(path.name):
                path.unlink(missing_ok=True)
        for name in [name for name, progress in self._progress.items() if progress.ended.is_set()]:
            if name not in self._drawing:
                del self._progress[name]

    async def _expire_now_and_then(self) -> None:
        while True:
            await self.expire()
            await asyncio.sleep(_EXPIRE_EVERY)


def _let_go(submitted: SubmittedStory | None, folder: RunFolder) -> None:
    """Draw no more of a story, and give its folder back."""
    if submitted is not None:
        submitted.cancel()
        submitted.wait_until_let_go()
    folder.close()
