"""The one loop: from the scheduler to a worker, and back to the stories."""

import time
from collections.abc import Iterator, Sequence

from storyadapter.method.events import Event
from storyadapter.runtime.decoding import POLL_SECONDS
from storyadapter.runtime.scheduler import Scheduler
from storyadapter.runtime.story_source import StorySource
from storyadapter.runtime.worker import Worker


def turn(scheduler: Scheduler, worker: Worker, *, feed: bool = True) -> bool:
    """Give the worker what it is free for, let it go on, and tell the stories what it has finished; doesn't wait.

    Args:
        feed: whether it may begin with more.

    Returns:
        Whether something was told or begun; if not, wait a little.
    """
    busy = False
    if feed and worker.is_free:
        for source in scheduler.sources:
            if source.error is None and (pictures := source.to_embed):
                try:
                    source.take_embeddings(worker.embed(pictures, source.embedding_groups))
                except RuntimeError as error:
                    source.fail(error)
        if (batch := scheduler.next_batch(worker)) is not None:
            worker.start(batch)
            busy = True
    for report in worker.advance():
        scheduler.take(report, worker)
        busy = True
    return busy


def drive(worker: Worker, sources: Sequence[StorySource]) -> Iterator[tuple[StorySource, Event]]:
    """Draw stories to their end, together, and tell what happens to each; the worker is closed then.

    Raises:
        What stopped a story: RunError, torch.OutOfMemoryError.
    """
    scheduler = Scheduler()
    for source in sources:
        scheduler.add(source)
    try:
        while scheduler.sources:
            if not turn(scheduler, worker):
                time.sleep(POLL_SECONDS)
            for source in tuple(scheduler.sources):
                yield from ((source, event) for event in source.events())
                if source.is_finished:
                    scheduler.remove(source)
                    if source.error is not None:
                        raise source.error
    finally:
        worker.close()
