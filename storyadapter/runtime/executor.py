"""Many stories at once, drawn from a thread of this process: submit, listen, cancel."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Self

from storyadapter.method.events import Event
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.decoding import POLL_SECONDS
from storyadapter.runtime.drive import turn
from storyadapter.runtime.frame_store import FrameStore
from storyadapter.runtime.given_pictures import Pictures
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.runtime.scheduler import Scheduler
from storyadapter.runtime.story_jobs import in_chunks, most_chunks
from storyadapter.runtime.story_source import StorySource


class SubmittedStory:
    """A story that was given to an executor. Its events are told once, to whoever asks first, from any thread.

    Iterate over it, with `for` or `async for`: it ends when the story is drawn, and raises what stopped it otherwise,
    `concurrent.futures.CancelledError` if that was `cancel`.
    """

    def __init__(self, begin: Callable[[], StorySource], is_measured: Callable[[], bool], share: int = 1) -> None:
        self._begin = begin
        self._is_measured = is_measured
        self._share = share
        self._told: deque[Event] = deque()
        self._end: BaseException | None = None
        self._has_ended = False
        self._is_cancelled = False
        self._let_go = threading.Event()
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()

    def cancel(self) -> None:
        """Draw no more of it. It ends at once; what is told already can still be read."""
        self._is_cancelled = True
        self._finish(CancelledError())

    @property
    def has_ended(self) -> bool:
        """Whether it is drawn, failed or cancelled."""
        return self._has_ended

    def wait_until_let_go(self) -> None:
        """Wait until nothing calls its store any more: a little longer than `cancel`."""
        self._let_go.wait()

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._told or self._has_ended)
                if not self._told:
                    break
                event = self._told.popleft()
            yield event
        if self._end is not None:
            raise self._end

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The same without keeping the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.add(wake)
        try:
            while True:
                changed.clear()
                with self._changed:
                    event = self._told.popleft() if self._told else None
                    ended = self._has_ended
                if event is not None:
                    yield event
                elif ended:
                    break
                else:
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.discard(wake)
        if self._end is not None:
            raise self._end

    def _tell(self, events: list[Event]) -> None:
        with self._changed:
            if not self._has_ended:
                self._told.extend(events)
            self._wake()

    def _finish(self, end: BaseException | None) -> None:
        with self._changed:
            if not self._has_ended:
                self._has_ended, self._end = True, end
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


class LocalExecutor:
    """Draws any number of stories, their frames together where they may be; use it in a `with` statement.

    All its methods may be called from any thread. A story that fails, or is cancelled, doesn't disturb the others.

    Args:
        pipeline: whose workers draw; nobody else may run it as long as the executor is open.

    Attributes:
        error: why it draws nothing any more, where its devices failed.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.error: BaseException | None = None
        self._pipeline = pipeline
        self._scheduler = Scheduler()
        self._arrived: deque[SubmittedStory] = deque()
        self._is_closing = self._cancels_rest = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="stories", daemon=True)
        self._thread.start()

    @property
    def batch_frames(self) -> tuple[int, int]:
        """Frames in all batches so far, and how many there was room for."""
        return self._scheduler.given

    def submit(
        self,
        story: Story,
        plan: RunPlan | None = None,
        *,
        style: str | None = None,
        references: Mapping[str, Pictures] | None = None,
        store: FrameStore | None = None,
        share: int = 1,
    ) -> SubmittedStory:
        """Give it a story; returns at once. Arguments as of `StoryPipeline.run`; `store` is called from its thread.

        Args:
            share: of the devices, beside other stories: one of 4 gets four times as much as one of 1.

        Raises:
            InputError: the engine can't serve the plan.
            RuntimeError: the executor is closed.
        """
        pipeline = self._pipeline
        decided = pipeline.decided(plan or RunPlan())
        frames, negatives = len(story.frames), len(story.negative_prompts(decided))
        pictures = pipeline.check(story, decided, style, references=references)
        chunks = most_chunks(in_chunks(story.final_frames(decided, style), decided, pipeline.tokenizers))
        submitted = SubmittedStory(
            lambda: pipeline.source(story, decided, style, pictures, store=store),
            lambda: pipeline.knows_batching(decided, frames, negatives, chunks),
            share,
        )
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the executor is closed")
            self._arrived.append(submitted)
            self._changed.notify_all()
        return submitted

    def close(self, *, wait: bool = False) -> None:
        """Take no more stories, and cancel those that aren't drawn; with `wait`, draw them first."""
        with self._changed:
            self._is_closing = True
            self._cancels_rest = not wait
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None)

    def _work(self) -> None:
        self._pipeline.use_device()
        scheduler, workers = self._scheduler, self._pipeline.workers()
        drawn: dict[StorySource, SubmittedStory] = {}
        end: BaseException = CancelledError()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._arrived or drawn or self._is_closing)
                    if self._is_closing and (self._cancels_rest or not (self._arrived or drawn)):
                        return
                # all that came by now are there before the next batch is formed, so that they may share it
                feed = True
                while feed and self._arrived:
                    # what has to be measured waits until nothing is on its way, and nothing more is begun before it
                    feed = self._arrived[0]._is_measured() or all(worker.is_idle for worker in workers())
                    if feed:
                        self._admit(self._arrived.popleft(), scheduler, drawn)
                happened = turn(scheduler, workers(), feed=feed)
                for source, story in list(drawn.items()):
                    try:
                        story._tell(list(source.events()))
                    except Exception as error:  # a frame that can't be kept is this story's alone
                        source.fail(error)
                    if source.is_finished or story._is_cancelled:
                        del drawn[source]
                        scheduler.remove(source)
                        for worker in workers():
                            worker.cancel(source)
                        story._finish(source.error)
                        story._let_go.set()
                if not happened:
                    time.sleep(POLL_SECONDS)
        except BaseException as error:
            end = self.error = error  # the device itself failed: nobody's story goes on
        finally:
            for worker in workers():
                worker.close()
            with self._changed:
                self._is_closing = True
                for story in (*drawn.values(), *self._arrived):
                    story._finish(end)
                    story._let_go.set()

    def _admit(self, arrived: SubmittedStory, scheduler: Scheduler, drawn: dict[StorySource, SubmittedStory]) -> None:
        if arrived.has_ended:
            arrived._let_go.set()
            return
        try:
            source = arrived._begin()
        except Exception as error:  # such as lack of memory for a single frame, or a store that can't be read
            arrived._finish(error)
            arrived._let_go.set()
            return
        source.share = arrived._share
        drawn[source] = arrived
        scheduler.add(source)
