"""Runs the app until a signal, or until no device is left."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from storyadapter.method.errors import Field, InputError, RunError
from storyadapter.output.files import lock_folder
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.app import make_app
from storyadapter.serve.gate import Gate, Keys, is_loopback
from storyadapter.serve.limits import Limits
from storyadapter.serve.metrics import Metrics
from storyadapter.serve.stories import Stories

_CLOSE_SECONDS = 5  # for connections that are open at a signal
_LOOK_EVERY = 0.5


def check_address(host: str, keys: Keys) -> None:
    """Raises InputError: others could reach a server that asks for no key."""
    if not keys and not is_loopback(host):
        raise InputError(
            Field("host"), f" {host} can be reached by others", expected=("API keys (", Field("keys"), ")")
        )


def serve(
    pipeline: Pipeline,
    data: Path,
    *,
    host: str,
    port: int,
    keys: Keys,
    hosts: tuple[str, ...],
    limits: Limits,
    gpu_price: float | None,
    defaults: Mapping[str, Any],
) -> None:
    """Serve until SIGTERM or Ctrl-C; stories that aren't finished then go on when it is started again.

    Args:
        pipeline: what draws.
        data: folder of queue and pictures, made if it isn't there.
        host, port: to listen on.
        keys: see `Keys`.
        hosts: other names by which the server may be called.
        gpu_price: of an hour of a device, in any unit.
        defaults: see `make_app`.

    Raises:
        InputError: another server uses the folder.
        RunError: all devices failed; or the port can't be had.
    """
    lock = lock_folder(data)
    try:
        stories = Stories(pipeline, data, limits, Metrics(gpu_price))
        app = Gate(
            make_app(stories, keys, defaults),
            keys=keys,
            hosts=(host, "localhost", "127.0.0.1", "[::1]", *hosts),
            limits=limits,
        )
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        server = uvicorn.Server(config)

        async def until_stopped() -> None:
            try:
                await server.serve()
            except KeyboardInterrupt:  # it has ended in good order, and passes the signal on
                pass
            except SystemExit as error:  # uvicorn has told why
                raise RunError(f"can't listen on {host}:{port}") from error

        async def watched() -> None:
            running = asyncio.create_task(until_stopped())
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_EVERY)
                server.should_exit = server.should_exit or stories.error is not None
            await running

        asyncio.run(watched())
        if stories.error is not None:
            raise RunError(f"no device is left: {stories.error}") from stories.error
    finally:
        lock.release()
