"""A server in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.app import make_app
from storyadapter.serve.gate import Gate, Keys
from storyadapter.serve.limits import Limits
from storyadapter.serve.metrics import Metrics
from storyadapter.serve.stories import Stories


@contextmanager
def served(pipeline: Pipeline, folder: Path, limits: Limits, *, pixels: int, max_frames: int | None) -> Iterator[str]:
    """Serve on a free port of the loopback address as `serve` does, without keys; gives the address.

    Args:
        pipeline: what draws.
        folder: of queue and pictures.
        limits: of the server.
        pixels: height and width of a frame for which nothing else is said.
        max_frames: of a batch.
    """
    stories = Stories(pipeline, folder, limits, Metrics(gpu_price=3.0))
    app = make_app(stories, Keys(None), {"height": pixels, "width": pixels, "max_frames": max_frames})
    gate = Gate(app, keys=Keys(None), hosts=("127.0.0.1",), limits=limits)
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
