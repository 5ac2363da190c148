"""Stories over HTTP in your own application: `uvicorn examples.service:app` (extra `serve`).

`storyadapter-trt serve` is the whole of it (queue, restarts, keys, limits, a page); this is for whoever has a service
already. One pipeline and one executor serve all requests: their frames share UNet calls.

    curl -N http://127.0.0.1:8000/stories -H 'Content-Type: application/json' -d '{"prompts": ["a fox", "an owl"]}'
"""

import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import storyadapter
from storyadapter import FrameFinished, InputError, LocalExecutor, RunError, RunPlan, Story, SubmittedStory


class Request(BaseModel):
    prompts: list[str]
    steps: int = 20
    scales: list[float] = [0.3, 0.5]
    seed: int = 0


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with LocalExecutor(storyadapter.open(backend="eager")) as executor:
        app.state.executor = executor
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/stories")
async def draw(request: Request) -> StreamingResponse:
    """A line of JSON per picture, as soon as it is drawn."""
    try:
        story = Story.from_prompts(request.prompts)
        plan = RunPlan(seed=request.seed, steps=request.steps, scales=tuple(request.scales))
        submitted = app.state.executor.submit(story, plan)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    return StreamingResponse(lines(submitted), media_type="application/x-ndjson")


async def lines(submitted: SubmittedStory) -> AsyncIterator[str]:
    try:
        async for event in submitted:
            if isinstance(event, FrameFinished):
                png = io.BytesIO()
                event.picture.save(png, "png")
                picture = base64.b64encode(png.getvalue()).decode()
                yield json.dumps({"round": event.iteration, "frame": event.frame, "png": picture}) + "\n"
    except RunError as error:
        yield json.dumps({"error": str(error)}) + "\n"
    finally:
        submitted.cancel()  # where the client has gone away
