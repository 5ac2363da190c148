"""A server as its clients see it: stories, events, pictures, refusals."""

import base64
import json
import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from storyadapter import RunPlan, Story, StoryPipeline
from storyadapter.__main__ import main
from storyadapter.bench.serve_run import Server
from storyadapter.method import constants
from storyadapter.method.events import FrameFinished
from storyadapter.method.presets import PRESETS
from storyadapter.serve.app import make_app
from storyadapter.serve.gate import Gate, Keys
from storyadapter.serve.limits import Limits
from storyadapter.serve.queue import StoryQueue
from storyadapter.serve.requests import ImagesRequest, StoryRequest
from tests.storyadapter.serve import chromium
from tests.storyadapter.serve.serving import DEFAULTS, LIMITS, stories_of

SETTINGS = {"steps": 2, "seed": 3, "iterations": 1}
ASKED = {"prompts": ["a fox and 0 owls", "a fox and 1 owls", "a wolf"], "settings": SETTINGS}


def events(client: httpx.Client, name: str, after: int = 0) -> list[tuple[int, str, dict]]:
    found = []
    headers = {"Last-Event-ID": str(after)} if after else {}
    with client.stream("GET", f"/v1/stories/{name}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        number, kind = 0, ""
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            match key:
                case "id":
                    number = int(value)
                case "event":
                    kind = value
                case "data":
                    found.append((number, kind, json.loads(value)))
    return found


def drawn(pipeline: StoryPipeline, story: Story, plan: RunPlan) -> dict[tuple[int, int], np.ndarray]:
    told = pipeline.run(story, plan)
    return {(e.iteration, e.frame): np.asarray(e.picture) for e in told if isinstance(e, FrameFinished)}


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def test_a_story_is_accepted_followed_and_fetched(client: httpx.Client, pipeline: StoryPipeline) -> None:
    answer = client.post("/v1/stories", json=ASKED)
    assert answer.status_code == 202
    told = answer.json()
    assert answer.headers["location"] == f"/v1/stories/{told['id']}"
    assert told["state"] in ("queued", "in_progress") and told["frames_total"] == 6
    seen = events(client, told["id"])
    kinds = [kind for _, kind, _ in seen]
    assert [number for number, _, _ in seen] == list(range(1, len(seen) + 1))
    assert kinds[0] == "started" and kinds[-1] == "completed"
    assert kinds.count("frame_finished") == 6 and kinds.count("iteration_finished") == 2
    assert events(client, told["id"], after=len(seen) - 2) == seen[-2:]
    told = client.get(answer.headers["location"]).json()
    assert (told["state"], told["progress"], told["frames_done"]) == ("completed", 1.0, 6)
    assert told["cost"] == pytest.approx(told["device_seconds"] / 1200)
    plan = RunPlan(height=64, width=64, steps=2, seed=3, scales=(0.3,))
    expected = drawn(pipeline, Story(tuple(ASKED["prompts"]), style="none"), plan)
    for (iteration, frame), pixels in expected.items():
        found = client.get(f"/v1/stories/{told['id']}/iterations/{iteration}/frames/{frame}.png")
        assert found.headers["content-type"] == "image/png"
        assert (picture(found.content) == pixels).all()
    assert (picture(client.get(f"/v1/stories/{told['id']}/frames/2.png").content) == expected[1, 2]).all()
    names = ZipFile(BytesIO(client.get(told["links"]["archive.zip"]).content)).namelist()
    assert {"contact-sheet.png", "story.json", "iteration-00/frame-000.png", "frames/002.png"} <= set(names)
    assert not [name for name in names if name.startswith(".")]
    assert client.delete(f"/v1/stories/{told['id']}", params={"purge": True}).json()["state"] == "removed"
    assert client.get(f"/v1/stories/{told['id']}").status_code == 404


def test_the_same_request_with_the_same_key_is_the_same_story(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "tale 1"}
    first, second = (client.post("/v1/stories", json=ASKED, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = client.post("/v1/stories", json=ASKED | {"title": "another"}, headers=headers)
    assert (other.status_code, other.json()["field"]) == (409, "idempotency-key")


def test_a_story_is_cancelled(client: httpx.Client) -> None:
    told = [client.post("/v1/stories", json=ASKED).json() for _ in range(4)][-1]
    assert client.delete(f"/v1/stories/{told['id']}").json()["state"] == "cancelled"
    assert events(client, told["id"])[-1][1] == "cancelled"
    assert client.delete(f"/v1/stories/{told['id']}").json()["state"] == "cancelled"


@pytest.mark.parametrize(
    ("asked", "field", "detail"),
    [
        ({"prompts": []}, "prompts", "prompts: List should have at least 1 item after validation, not 0"),
        ({"prompts": ["a fox", " "]}, "prompts.1.prompt", "prompt 2 is only white space, expected words"),
        ({"prompts": ["a fox"] * 5}, "prompts", "prompts: 5; expected 4 at most on this server"),
        (
            {"prompts": ["a fox"], "settings": SETTINGS | {"steps": 4}},
            "steps",
            "steps: 4; expected 3 at most on this server",
        ),
        ({"prompts": ["a fox"], "settings": {"steps": 0}}, "steps", "steps is 0; expected 1 to 999"),
        ({"prompts": ["a fox"], "settings": {"steps": 2}}, "iterations", "iterations: 10; expected 2 at most"),
        (
            {"prompts": ["a fox"], "settings": {"steps": 2, "iterations": 1, "scales": [0.3, 0.4]}},
            "settings.iterations",
            "iterations: 1 beside 2 scales; expected one of them",
        ),
        ({"prompts": ["a fox"], "settings": {"preset": "lcm"}}, "preset", "preset lcm is for a UNet that takes"),
        ({"prompts": ["a \ud800"]}, None, "a text holds U+D800, which is no character"),
        ({"prompts": ["a fox"], "settings": SETTINGS | {"height": 65}}, "height", "height is 65; expected a multiple"),
        ({"prompts": ["a fox"], "settings": {"sampler": "ddim"}}, "settings.sampler", "Extra inputs"),
        ({"prompts": ["a fox"], "style": "baroque"}, "style", "baroque"),
        ({"prompts": ["a fox"], "file": "/etc/passwd"}, "file", "Extra inputs"),
    ],
)
def test_what_cannot_be_drawn_is_a_problem_with_its_field(
    client: httpx.Client, asked: dict, field: str | None, detail: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/stories", content=json.dumps(asked), headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["field"] == field and problem["status"] == 422
    assert detail in problem["detail"]


def test_what_comes_otherwise_than_it_should_is_refused(client: httpx.Client) -> None:
    def post(**more) -> int:
        return client.post("/v1/stories", **more).status_code

    assert client.get("/v1/stories", headers={"Host": "evil.example"}).status_code == 421
    assert post(content=json.dumps(ASKED), headers={"Content-Type": "text/plain"}) == 415
    assert post(content=b"{", headers={"Content-Type": "application/json"}) == 422
    assert post(json={"prompts": ["a fox " * 400_000]}) == 413

    def endless() -> Iterator[bytes]:
        yield from (b" " * 65536 for _ in range(64))

    assert post(content=endless(), headers={"Content-Type": "application/json"}) == 413
    assert client.get("/v1/stories/../../etc/passwd").status_code == 404
    assert client.put("/v1/stories").status_code in (405, 415)
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "access-control-allow-origin" not in page.headers
    assert client.get("/page/app.js").status_code == client.get("/docs").status_code == 200
    assert client.get("/healthz").text == "ok" and client.get("/readyz").text == "ready"


def test_the_clients_of_openai_draw_pictures(address: str, pipeline: StoryPipeline) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(
        prompt="a red fox", n=2, size="64x96", model="any", extra_body={"seed": 5, "steps": 2}
    )
    plan = RunPlan(height=96, width=64, steps=2, seed=5, scales=())
    for number, image in enumerate(answer.data):
        (expected,) = drawn(pipeline, Story(("a red fox",)), replace(plan, seed=5 + number)).values()
        found = picture(base64.b64decode(image.b64_json))
        assert np.abs(found.astype(int) - expected).max() <= 1  # both were drawn in one call
    with pytest.raises(openai.UnprocessableEntityError, match="steps: 50; expected 3 at most"):
        client.images.generate(prompt="a red fox")


def test_curl_draws_a_story(address: str, tmp_path: Path) -> None:
    def curl(*words: str) -> bytes:
        return subprocess.run(["curl", "--silent", "--fail", *words], check=True, stdout=subprocess.PIPE).stdout

    Image.new("RGB", (40, 30), "red").save(tmp_path / "ada.png")
    data = ("--data-binary", f"@{tmp_path / 'ada.png'}")
    sent = json.loads(curl("-H", "Content-Type: image/png", *data, f"{address}/v1/uploads"))
    asked = ASKED | {"characters": {"fox": {"references": [sent["id"]]}}}
    said = curl("-H", "Content-Type: application/json", "-d", json.dumps(asked), f"{address}/v1/stories")
    name = json.loads(said)["id"]
    assert b"event: completed" in curl(f"{address}/v1/stories/{name}/events")
    assert picture(curl(f"{address}/v1/stories/{name}/contact-sheet.png")).size


def test_metrics_have_the_names_of_the_field(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "e2e_request_latency_s_bucket",
        "unet_rows_total",
        "batch_frames_total",
        "batch_room_total",
    ):
        assert f"\nstoryadapter:{name}" in text, name
    assert 'storyadapter:request_success_total{finished_reason="completed"}' in text


@pytest.mark.cluster
def test_the_page_is_used_by_keyboard_and_told_to_screen_readers(address: str, tmp_path: Path) -> None:
    if chromium.PROGRAM is None:
        assert "CI" not in os.environ, "no chromium; .ci/run installs it"
        pytest.skip("no chromium: apt-get install chromium")
    with chromium.opened(tmp_path / "profile") as page:
        page.open(address)
        page.tab_to("#prompts")
        page.type("a fox reads\na fox sleeps")
        page.tab_to("summary")
        page.press("Enter")
        for field, value in (("#title", "A day"), ("#iterations", "1"), ("#steps", "2"), ("#seed", "7")):
            page.tab_to(field)
            page.type(value)
        page.tab_to("#new button")
        page.press("Enter")
        page.wait_for("document.querySelector('#state').textContent.startsWith('done, 4 of 4 frames')")
        page.wait_for("[...document.querySelectorAll('#frames img')].filter(i => i.naturalWidth === 64).length === 2")
        assert page.value("document.querySelector('#iteration-shown').textContent") == "1 of 1"
        told = page.names()
        for expected in (
            ("heading", "A day"),
            ("image", "a fox reads"),
            ("button", "Cancel"),
            ("textbox", "Prompts, one per line and frame"),
            ("slider", "Iteration"),
            ("link", "Contact sheet"),
        ):
            assert expected in told, (expected, told)
        assert all(name for role, name in told if role in ("button", "link", "textbox", "image", "slider"))
        page.tab_to("#iteration")
        page.press("ArrowLeft")
        page.wait_for("document.querySelector('#frames img').src.endsWith('/iterations/0/frames/0.png')")
        page.tab_to("#frames button")
        page.press("Enter")
        assert page.value("document.querySelector('#edit-title').textContent") == "Frame 1"
        assert page.value("document.querySelector('#edit-guide').hidden")  # there is no ControlNet
        page.value("document.querySelector('#edit-prompt').value = 'a fox runs'")
        page.tab_to("#edit > button")
        page.press("Enter")
        page.wait_for("document.querySelector('#frames figcaption').textContent === 'a fox runs'")
        page.wait_for("document.querySelector('#state').textContent.startsWith('done, 4 of 4 frames')")
        page.value("document.querySelector('#again').click()")
        assert page.value("document.querySelector('#prompts').value") == "a fox runs\na fox sleeps"
        page.value("document.querySelector('#prompts').value = 'x\\nx\\nx\\nx\\nx'")
        page.value("document.querySelector('#new').requestSubmit()")
        page.wait_for("document.querySelector('#message').textContent.startsWith('prompts: 5; expected 4 at most')")
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(Path(folder) / "page.png")
        page.open(f"{address}/docs")
        page.wait_for("document.querySelectorAll('#operations tr').length > 8")
        assert page.problems == []


@pytest.mark.cluster
def test_a_server_that_is_killed_goes_on_and_ends_in_good_order(
    tiny_model_dir: Path, pipeline: StoryPipeline, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--base-model", str(tiny_model_dir), "--image-encoder", str(tiny_model_dir / "image_encoder")]
    words += ["--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "eager"]
    server = Server([*words, "--port", str(port), "--max-frames", "1"], tmp_path / "data")
    server.start()
    asked = ASKED | {"settings": SETTINGS | {"steps": 40}}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, server)
            names = [client.post("/v1/stories", json=asked).json()["id"] for _ in range(3)]
            with client.stream("GET", f"/v1/stories/{names[0]}/events") as answer:
                next(line for line in answer.iter_lines() if line == "event: frame_finished")
            server.kill()
            server.start()
            wait_until_ready(client, server)
            for name in names:
                told = events(client, name)
                kinds = [kind for _, kind, _ in told]
                assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
                assert kinds[-1] == "completed" and kinds.count("completed") == 1
                places = {(e["iteration"], e["frame"]) for _, kind, e in told if kind.startswith("frame_")}
                assert len(places) == 6
            plan = RunPlan(height=64, width=64, steps=40, seed=3, scales=(0.3,), max_frames=1)
            expected = drawn(pipeline, Story(tuple(ASKED["prompts"]), style="none"), plan)
            last = picture(client.get(f"/v1/stories/{names[-1]}/iterations/0/frames/2.png").content)
            assert np.abs(last.astype(int) - expected[0, 2]).max() <= 1
            client.post("/v1/stories", json=asked)
    finally:
        assert server.stop() == 0


def wait_until_ready(client: httpx.Client, server: Server) -> None:
    while True:
        server.check()
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def test_presets_are_settings_and_what_is_said_beside_them_wins() -> None:
    defaults = DEFAULTS | {"preset": "lcm-lora"}
    few = StoryRequest(prompts=["a fox"], settings={"preset": "turbo", "steps": 2, "iterations": 0}).plan(DEFAULTS)
    assert (few.scheduler, few.steps, few.guidance, few.timestep_spacing) == ("euler_a", 2, 0.0, "trailing")
    usual = StoryRequest(prompts=["a fox"], settings={"steps": 3}).plan(defaults)
    assert (usual.scheduler, usual.steps, usual.guidance) == ("lcm", 3, 1.0)
    ((_, picture),) = ImagesRequest(prompt="a fox", preset="turbo").stories(defaults)
    assert (picture.scheduler, picture.steps) == ("euler_a", 4)
    ((_, picture),) = ImagesRequest(prompt="a fox", preset="balanced").stories(defaults)
    assert picture.iterations == 1


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, constants.reference_scales()),
        ({"preset": "balanced"}, PRESETS["balanced"].settings["scales"]),
        ({"preset": "balanced", "iterations": 2}, constants.reference_scales(2)),
        ({"preset": "balanced", "scales": [0.25]}, (0.25,)),
    ],
)
def test_iterations_are_a_presets_unless_they_are_said(settings: dict[str, Any], scales: tuple[float, ...]) -> None:
    assert StoryRequest(prompts=["a fox"], settings=settings).plan(DEFAULTS).scales == scales


def test_a_wrong_limit_is_named_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--limit-frames", "0"]) == 2
    assert "--limit-frames is 0; expected 1 or more" in capsys.readouterr().err


# What needs nobody who draws.


@contextmanager
def queued_only(pipeline: StoryPipeline, folder: Path, keys: Keys, limits: Limits) -> Iterator[httpx.AsyncClient]:
    stories = stories_of(pipeline, folder, limits)
    app = Gate(
        make_app(stories, keys, DEFAULTS),
        keys=keys,
        hosts=("here",),
        limits=limits,
    )
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")
    stories.queue.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_key_sees_its_own_stories_alone(
    anyio_backend: str, pipeline: StoryPipeline, tmp_path: Path, keys: Keys
) -> None:
    with queued_only(pipeline, tmp_path, keys, LIMITS) as client:
        assert (await client.get("/v1/stories")).status_code == 401
        assert (await client.get("/v1/stories", headers={"Authorization": "Bearer wrong"})).status_code == 401
        ada, bo = ({"Authorization": f"Bearer {key}"} for key in ("secret", "secret2"))
        name = (await client.post("/v1/stories", json=ASKED, headers=ada)).json()["id"]
        assert (await client.get(f"/v1/stories/{name}", headers=ada)).status_code == 200
        assert (await client.get(f"/v1/stories/{name}", headers=bo)).status_code == 404
        assert (await client.delete(f"/v1/stories/{name}", headers=bo)).status_code == 404
        assert (await client.get("/v1/stories", headers=bo)).json() == {"stories": []}
        assert (await client.post("/session", json={"key": "wrong"})).status_code == 401
        session = await client.post("/session", json={"key": "secret"})
        assert (
            "httponly" in session.headers["set-cookie"].lower()
            and "samesite=strict" in session.headers["set-cookie"].lower()
        )
        assert len((await client.get("/v1/stories")).json()["stories"]) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_full_queue_and_a_greedy_key_are_told_to_come_again(
    anyio_backend: str, pipeline: StoryPipeline, tmp_path: Path, keys: Keys
) -> None:
    limits = replace(LIMITS, limit_queue=3, limit_stories=2)
    with queued_only(pipeline, tmp_path, keys, limits) as client:
        found = []
        for key in ("secret", "secret", "secret", "secret2", "secret2"):
            answer = await client.post("/v1/stories", json=ASKED, headers={"Authorization": f"Bearer {key}"})
            found.append((answer.status_code, answer.headers.get("retry-after")))
        assert found == [(202, None), (202, None), (429, "30"), (202, None), (429, "30")]


def test_what_was_being_drawn_waits_again_and_interactive_stories_come_first(tmp_path: Path) -> None:
    queue = StoryQueue(tmp_path / "queue")
    slow = queue.add("", "batch", {"prompts": ["a"]}, None, {})
    fast = queue.add("", "interactive", {"prompts": ["b"]}, None, {})
    assert queue.next() == fast and queue.place(slow) == 1 and queue.place(fast) == 0
    queue.begin(fast.id)
    queue.tell(fast.id, "started", {})
    assert queue.next() == slow
    queue.close()
    again = StoryQueue(tmp_path / "queue")
    assert again.next().id == fast.id
    assert again.end(fast.id, "completed").number == 2 and again.end(fast.id, "failed") is None
    assert [event.kind for event in again.events(fast.id)] == ["started", "completed"]
    assert again.expired(time.time() + 1) == [fast.id]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_what_a_killed_server_had_drawn_and_not_told_is_told_by_the_next(
    anyio_backend: str, pipeline: StoryPipeline, tmp_path: Path
) -> None:
    story, plan = Story(("a fox", "an owl")), RunPlan(height=64, width=64, steps=2, seed=3, scales=(0.3,))
    async with stories_of(pipeline, tmp_path) as stories:
        name = stories.accept("", story, pipeline.decided(plan), style="none").id
        assert (await stories.wait(name)).state == "completed"
        whole = stories.queue.told(name)
    with sqlite3.connect(tmp_path / "queue.sqlite") as queue:
        queue.execute("delete from events where number > 2")
        queue.execute("update stories set state='in_progress', finished=null")
    async with stories_of(pipeline, tmp_path) as stories:
        ended = await stories.wait(name)
        assert ended.state == "completed", ended.error
        places = {(iteration, frame) for kind, iteration, frame in stories.queue.told(name) if kind.startswith("frame")}
        assert places == {(iteration, frame) for iteration in range(2) for frame in range(2)}
        assert {one for one in whole if one[0] == "iteration_finished"} <= stories.queue.told(name)
        assert [event.kind for event in stories.queue.events(name)].count("completed") == 1


def test_openai_clients_may_have_prompts_cut() -> None:
    ((_, cut),) = ImagesRequest(prompt="a fox", prompt_chunks="1").stories(DEFAULTS)
    ((_, whole),) = ImagesRequest(prompt="a fox").stories(DEFAULTS)
    assert (cut.prompt_chunks, whole.prompt_chunks) == ("1", "auto")
