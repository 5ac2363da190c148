"""The HTTP interface: stories as jobs, pictures by OpenAI's images API, health, metrics, the page."""

import asyncio
import base64
import json
import re
import time
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

import storyadapter
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.method.story_parts import check_style
from storyadapter.output.frame_files import frame_path
from storyadapter.serve.gate import COOKIE, UPLOADS, Keys
from storyadapter.serve.problems import MEDIA_TYPE, Problem, add_problem_handlers
from storyadapter.serve.queue import OPEN, QueuedStory
from storyadapter.serve.requests import EditRequest, ImagesRequest, StoryRequest, check
from storyadapter.serve.stories import Stories
from storyadapter.serve.uploads import ids_in

PAGE: Final = Path(__file__).parent / "page"
_PAUSE: Final = 15.0  # seconds without an event after which a comment keeps the connection open
_AGAIN: Final = 30  # seconds, for Retry-After
_Number = Annotated[int, PathParameter(ge=0, le=2**31)]
_PROBLEM: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"description": "what is wrong with the request", "content": {MEDIA_TYPE: {}}},
    "5XX": {"description": "what is wrong with the server", "content": {MEDIA_TYPE: {}}},
}


_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}
_PICTURE_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {kind: _BYTES for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")},
    }
}


class Session(BaseModel):
    """A key, for the cookie of the page."""

    model_config = ConfigDict(extra="forbid")

    key: str


def make_app(stories: Stories, keys: Keys, defaults: Mapping[str, Any]) -> FastAPI:
    """The app, without the gate before it.

    Args:
        stories: entered and left with the app.
        keys: whoever has one may begin a session.
        defaults: of a plan's settings for which nothing else is said: height, width, max_frames; and a preset of them.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with stories:
            yield

    app = FastAPI(
        title="storyadapter-trt",
        version=storyadapter.__version__,
        description="Long stories in pictures: POST a story, follow its events, fetch its frames.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_PROBLEM,
    )
    add_problem_handlers(app)
    queue, limits, reading = stories.queue, stories.limits, asyncio.Lock()

    def own(request: Request, name: str) -> QueuedStory:
        """A story of whoever asks."""
        try:
            story = queue.story(name)
        except KeyError:
            story = None
        if story is None or story.owner != request.state.owner:
            raise Problem(404, "there is no such story", field="story")
        return story

    def check_story(owner: str, story: Story, plan: RunPlan, preset: str | None = None) -> None:
        """Raises InputError, Problem: it can't be drawn."""
        for name, field in sorted(ids_in(story.to_dict()).items()):
            if not stories.uploads.holds(owner, name):
                raise Problem(422, f"there is no upload {name}; expected an id of {UPLOADS}", field=field)
        check(stories.uploads.story(owner, story.to_dict()), plan, stories.pipeline, limits, preset)

    async def checked(owner: str, story: Story, plan: RunPlan, preset: str | None) -> None:
        """As `check_story`; whoever waits meanwhile may have come first."""
        async with reading:  # pictures of many pixels take memory
            await asyncio.to_thread(check_story, owner, story, plan, preset)

    def has_room(owner: str, more: int = 1) -> None:
        if stories.error is not None:
            raise Problem(503, "no device is left; the server is about to end", retry_after=_AGAIN)
        if queue.count("queued") + more > limits.limit_queue:
            raise Problem(429, f"{limits.limit_queue} stories wait", retry_after=_AGAIN)
        if queue.count(*OPEN, owner=owner) + more > limits.limit_stories:
            raise Problem(429, f"{limits.limit_stories} stories of this key aren't finished", retry_after=_AGAIN)

    def told(story: QueuedStory) -> dict[str, Any]:
        """What is said of a story."""
        progress, iterations = stories.progress(story.id), len(story.plan["scales"]) + 1
        frames = len(story.story["prompts"]) * iterations
        done = frames if story.state == "completed" else min(progress.frames, frames)
        share = 1.0 if story.state == "completed" else min(1.0, progress.rows / max(1, progress.of_rows))
        price = stories.metrics.price(story.seconds)
        return {
            "id": story.id,
            "state": story.state,
            "priority": story.priority,
            "title": story.story["title"],
            "prompts": [frame if isinstance(frame, str) else frame["prompt"] for frame in story.story["prompts"]],
            "style": story.style,
            "characters": story.story["characters"],
            "settings": {name: value for name, value in story.plan.items() if name != "max_frames"},
            "iterations": iterations,
            "frames_done": done,
            "frames_total": frames,
            "progress": share,
            "seconds_left": stories.seconds_left(story),
            "place": queue.place(story) if story.state == "queued" else None,
            "device_seconds": story.seconds,
            "cost": price,
            "accepted": story.accepted,
            "started": story.started,
            "finished": story.finished,
            "error": story.error,
            "edit_of": story.edit_of,
            "links": {name: f"/v1/stories/{story.id}/{name}" for name in ("events", "story.json", "archive.zip")},
        }

    def waiting(story: QueuedStory) -> JSONResponse:
        return JSONResponse(told(story), 202, {"Location": f"/v1/stories/{story.id}"})

    def picture(path: Path, what: str) -> FileResponse:
        if not path.is_file():
            raise Problem(404, f"{what} isn't drawn")
        kind = {".png": "image/png", ".json": "application/json", ".gif": "image/gif"}[path.suffix]
        return FileResponse(path, media_type=kind)

    @app.post("/v1/stories", status_code=202)
    async def accept_story(
        asked: StoryRequest, request: Request, idempotency_key: Annotated[str | None, Header(max_length=255)] = None
    ) -> JSONResponse:
        """A story waits to be drawn. Sent again with the same Idempotency-Key, it is the same story."""
        owner, digest = request.state.owner, asked.digest()

        def known() -> QueuedStory | None:
            found = None if idempotency_key is None else queue.repeated(owner, idempotency_key)
            if found is not None and found.digest != digest:
                raise Problem(409, "another story was sent with this key before", field="idempotency-key")
            return found

        if (before := known()) is not None:
            return waiting(before)
        story, plan = asked.story(), stories.pipeline.decided(asked.plan(defaults))
        await checked(owner, story, plan, getattr(asked.settings, "preset", None))
        if (before := known()) is not None:  # it was sent twice at once
            return waiting(before)
        has_room(owner)
        accepted = stories.accept(
            owner,
            story,
            plan,
            style=check_style(story.style or "none"),
            priority=asked.priority,
            idempotency=idempotency_key,
            digest=digest,
        )
        return waiting(accepted)

    @app.get("/v1/stories")
    async def list_stories(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """Stories of this key, the newest first."""
        return {"stories": [told(story) for story in queue.stories(request.state.owner, limit)]}

    @app.get("/v1/stories/{name}")
    async def get_story(name: str, request: Request) -> dict[str, Any]:
        """State, progress, seconds left, place in the queue, cost."""
        return told(own(request, name))

    @app.delete("/v1/stories/{name}")
    async def cancel_story(name: str, request: Request, purge: bool = False) -> dict[str, Any]:
        """Draw no more of it; with `purge`, remove it."""
        own(request, name)
        await (stories.remove if purge else stories.cancel)(name)
        return {"id": name, "state": "removed"} if purge else told(own(request, name))

    @app.post("/v1/stories/{name}/edits", status_code=202)
    async def edit_story(name: str, asked: EditRequest, request: Request) -> JSONResponse:
        """A new story: this finished one with some frames drawn again, beside all others as they are."""
        story = own(request, name)
        if story.state != "completed":
            raise Problem(409, f"the story is {story.state}; expected a completed one", field="story")
        has_room(request.state.owner)
        how: dict[str, Any] = {"follows": asked.follow, "priority": asked.priority}
        async with reading:  # pictures of many pixels take memory
            return waiting(await stories.edit(story, asked.changes(), partial(check_story, story.owner), **how))

    @app.get("/v1/stories/{name}/events")
    async def story_events(
        name: str, request: Request, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> StreamingResponse:
        """Server-sent events: started, frame_finished, iteration_finished, completed, failed, cancelled."""
        own(request, name)
        if last_event_id is not None and not re.fullmatch(r"[0-9]{1,18}", last_event_id):
            raise Problem(422, f"{last_event_id!r} is no event of this story", field="last-event-id")
        after = int(last_event_id or 0)

        async def lines() -> AsyncIterator[str]:
            async for event in stories.events(name, after, pause=_PAUSE):
                if event is None:
                    yield ": still here\n\n"
                else:
                    yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/v1/stories/{name}/iterations/{iteration}/frames/{frame}.png")
    async def frame_of_iteration(name: str, iteration: _Number, frame: _Number, request: Request) -> FileResponse:
        """A frame as it was in an iteration, counted from 0."""
        story = own(request, name)
        iterations, frames = len(story.plan["scales"]) + 1, len(story.story["prompts"])
        path = frame_path(stories.path(name), iteration, frame, iterations=iterations, frames=frames)
        return picture(path, f"frame {frame} of iteration {iteration}")

    @app.get("/v1/stories/{name}/frames/{frame}.png")
    async def newest_frame(name: str, frame: _Number, request: Request) -> FileResponse:
        """A frame as the last iteration has it that has drawn it."""
        story = own(request, name)
        iterations, frames = len(story.plan["scales"]) + 1, len(story.story["prompts"])
        paths = [
            frame_path(stories.path(name), iteration, frame, iterations=iterations, frames=frames)
            for iteration in reversed(range(iterations))
        ]
        return picture(next((path for path in paths if path.is_file()), paths[-1]), f"frame {frame}")

    @app.get("/v1/stories/{name}/{file}")
    async def story_file(name: str, file: str, request: Request) -> Response:
        """contact-sheet.png, story.gif, story.json, and archive.zip with all of them and every frame."""
        own(request, name)
        folder = stories.path(name)
        if file in ("contact-sheet.png", "story.gif", "story.json"):
            return picture(folder / file, file)
        if file != "archive.zip":
            raise Problem(404, f"there is no {file!r}")
        packed = await asyncio.to_thread(_archive, folder)
        return Response(packed, media_type="application/zip")

    @app.post(UPLOADS, status_code=201, openapi_extra=_PICTURE_BODY)
    async def upload_picture(request: Request) -> JSONResponse:
        """A picture, as it is in its file, that stories can attend to by its id; it is kept as long as one needs it."""
        data = await request.body()
        async with reading:  # a picture of many pixels takes memory
            kept = await asyncio.to_thread(stories.uploads.add, request.state.owner, data)
        return JSONResponse(asdict(kept), 201, {"Location": f"{UPLOADS}/{kept.id}"})

    @app.delete(UPLOADS + "/{name}")
    async def remove_upload(name: str, request: Request) -> dict[str, Any]:
        """Removes a picture that no unfinished story needs."""
        owner = request.state.owner
        if not stories.uploads.holds(owner, name):
            raise Problem(404, "there is no such upload", field="upload")
        if queue.uses(name, open_only=True):
            raise Problem(409, "a story that isn't finished needs this picture", field="upload")
        stories.uploads.remove(owner, name)
        return {"id": name, "state": "removed"}

    @app.post("/v1/images/generations")
    async def generate_images(asked: ImagesRequest, request: Request) -> dict[str, Any]:
        """As OpenAI's images API: each picture is a story of one frame, from text alone, with a seed of its own."""
        decided, owner = stories.pipeline.decided, request.state.owner
        wanted = [(story, decided(plan)) for story, plan in asked.stories(defaults)]
        for story, plan in wanted:
            await checked(owner, story, plan, asked.preset)
        has_room(owner, len(wanted))
        accepted = [stories.accept(owner, story, plan, style="none") for story, plan in wanted]
        try:
            pictures = []
            for item in accepted:
                ended = await stories.wait(item.id)
                if ended.state != "completed":
                    raise Problem(503, (ended.error or {}).get("detail", f"the picture was {ended.state}"))
                path = frame_path(stories.path(item.id), 0, 0, iterations=1, frames=1)
                data = await asyncio.to_thread(path.read_bytes)
                pictures.append({"b64_json": base64.b64encode(data).decode(), "seed": ended.settings.seed})
            return {"created": int(time.time()), "data": pictures}
        finally:
            for item in accepted:
                await asyncio.shield(stories.remove(item.id))

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> str:
        """Stories are accepted and drawn."""
        if stories.error is not None:
            raise Problem(503, f"nothing is drawn any more: {stories.error}")
        if stories.is_paused:
            raise Problem(503, "the disk is full", retry_after=_AGAIN)
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await asyncio.to_thread(stories.measured), media_type="text/plain; version=0.0.4")

    @app.post("/session", status_code=204)
    async def begin_session(asked: Session, response: Response) -> None:
        """The page keeps its key in a cookie that no script can read."""
        if keys.owner(asked.key) is None:
            raise Problem(401, "this key isn't known", field="key")
        response.set_cookie(COOKIE, asked.key, httponly=True, samesite="strict")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    @app.get("/page/{file}", include_in_schema=False)
    async def page_file(file: str) -> FileResponse:
        known = {path.name: path for path in PAGE.iterdir()}
        if file not in known:
            raise Problem(404, f"there is no {file!r}")
        return FileResponse(known[file])

    return app


def _archive(folder: Path) -> bytes:
    """All pictures and the record; stored as they are, since PNG is compressed."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            relative = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                archive.write(path, relative)
    return packed.getvalue()
