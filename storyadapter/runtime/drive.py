"""The one loop: from the scheduler to workers, and back to the stories."""

import time
from collections.abc import Callable, Generator, Sequence

from storyadapter.method.errors import RunError
from storyadapter.method.events import Event
from storyadapter.runtime.batches import BatchWorker
from storyadapter.runtime.decoding import POLL_SECONDS
from storyadapter.runtime.scheduler import Scheduler
from storyadapter.runtime.story_source import StorySource


def turn(scheduler: Scheduler, workers: Sequence[BatchWorker], *, feed: bool = True) -> bool:
    """Give workers what they are free for, let them go on, and tell the stories what they have finished; doesn't wait.

    Args:
        feed: whether they may begin with more.

    Returns:
        Whether something was told or begun; if not, wait a little.
    """
    busy = False
    for worker in workers:
        if feed and worker.is_free:
            for source in scheduler.sources:
                if source.error is None and (pictures := source.to_embed):
                    try:
                        source.take_embeddings(worker.embed(pictures, source.embedding_groups))
                    except (RuntimeError, RunError) as error:
                        source.fail(error)
            if (batch := scheduler.next_batch(worker)) is not None:
                worker.start(batch)
                busy = True
        for report in worker.advance():
            scheduler.take(report, worker)
            busy = True
    return busy


def drive(
    workers: Callable[[], Sequence[BatchWorker]], sources: Sequence[StorySource]
) -> Generator[tuple[StorySource, Event], None, None]:
    """Draw stories to their end, together, and tell what happens to each; the workers are closed then.

    Raises:
        What stopped a story: RunError, torch.OutOfMemoryError.
    """
    scheduler = Scheduler()
    for source in sources:
        scheduler.add(source)
    try:
        while scheduler.sources:
            if not turn(scheduler, workers()):
                time.sleep(POLL_SECONDS)
            for source in tuple(scheduler.sources):
                yield from ((source, event) for event in source.events())
                if source.is_finished:
                    scheduler.remove(source)
                    if source.error is not None:
                        raise source.error
    finally:
        for worker in workers():
            worker.close()
