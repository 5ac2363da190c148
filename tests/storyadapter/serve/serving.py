"""A server in a thread of the tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from storyadapter import StoryPipeline
from storyadapter.serve.app import make_app
from storyadapter.serve.gate import Gate, Keys
from storyadapter.serve.limits import Limits
from storyadapter.serve.metrics import Metrics
from storyadapter.serve.queue import StoryQueue
from storyadapter.serve.stories import Stories

LIMITS = Limits(limit_frames=4, limit_iterations=2, limit_steps=3, limit_pixels=96)
DEFAULTS = {"height": 64, "width": 64, "max_frames": None}


def stories_of(pipeline: StoryPipeline, folder: Path, limits: Limits = LIMITS) -> Stories:
    return Stories(pipeline, StoryQueue(folder / "queue.sqlite"), folder / "stories", limits, Metrics(3.0))


@contextmanager
def served(pipeline: StoryPipeline, folder: Path) -> Iterator[str]:
    """A server in a thread of this process; its address."""
    app = make_app(stories_of(pipeline, folder), Keys(None), DEFAULTS)
    gate = Gate(app, keys=Keys(None), hosts=("127.0.0.1",), limit_body=LIMITS.limit_body)
    server = uvicorn.Server(uvicorn.Config(gate, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
