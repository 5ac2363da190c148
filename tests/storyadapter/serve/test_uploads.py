"""Pictures that clients send, and stories that are edited."""

import os
import struct
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline, api
from storyadapter.__main__ import main
from storyadapter.bench.served import served
from storyadapter.serve.app import make_app
from storyadapter.serve.gate import Gate, Keys
from storyadapter.serve.uploads import Uploads
from tests.control_models import poses, write_controlnet
from tests.oracle.comparison import errors_of_frames
from tests.storyadapter.checkpoint.spoil import tiny_paths
from tests.storyadapter.serve.serving import DEFAULTS, LIMITS, stories_of
from tests.storyadapter.serve.test_server import ASKED, SETTINGS, drawn, events, picture

PNG = {"Content-Type": "image/png"}


def png(size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claimed(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says this size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def sent(client: httpx.Client, data: bytes) -> str:
    answer = client.post("/v1/uploads", content=data, headers=PNG)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def finished(client: httpx.Client, answer: httpx.Response) -> str:
    assert answer.status_code == 202, answer.text
    name = answer.json()["id"]
    assert events(client, name)[-1][1] == "completed", client.get(f"/v1/stories/{name}").text
    return name


def test_a_story_attends_to_pictures_that_were_sent(
    client: httpx.Client, pipeline: StoryPipeline, tmp_path: Path
) -> None:
    answer = client.post("/v1/uploads", content=png(), headers=PNG)
    name = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/uploads/{name}"
    assert answer.json() == {"id": name, "width": 40, "height": 30} and sent(client, png()) == name
    other = sent(client, png(colour="blue"))
    characters = {"Ada": {"definition": "a fox", "references": [name]}}
    prompts = ["Ada reads", {"prompt": "an owl", "references": [other]}]
    asked = {"prompts": prompts, "characters": characters, "settings": SETTINGS}
    story = finished(client, client.post("/v1/stories", json=asked))
    told = client.get(f"/v1/stories/{story}").json()
    assert told["characters"] == characters and str(tmp_path.parent) not in str(told)
    record = client.get(f"/v1/stories/{story}/story.json").json()
    assert record["identity"]["story"]["characters"] == characters  # by id, not by a path of the server
    files = {name: tmp_path / "one.png", other: tmp_path / "two.png"}
    files[name].write_bytes(png())
    files[other].write_bytes(png(colour="blue"))
    expected = Story(
        ({"prompt": "Ada reads"}, {"prompt": "an owl", "references": [str(files[other])]}),
        style="none",
        characters={"Ada": {"definition": "a fox", "references": [str(files[name])]}},
    )
    plan = RunPlan(height=64, width=64, steps=2, seed=3, scales=(0.3,))
    for (iteration, frame), pixels in drawn(pipeline, expected, plan).items():
        found = client.get(f"/v1/stories/{story}/iterations/{iteration}/frames/{frame}.png").content
        assert (picture(found) == pixels).all()
    assert client.delete(f"/v1/uploads/{name}").json() == {"id": name, "state": "removed"}
    assert client.delete(f"/v1/uploads/{name}").status_code == 404


def test_a_picture_that_was_sent_guides_a_frame_by_a_controlnet_as_it_does_for_run(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    net, maps = write_controlnet(tiny_model_dir, tmp_path / "net"), tmp_path / "poses"
    maps.mkdir()
    for number, pose in enumerate(poses(2, 80, 64)):  # of another size than the frames
        pose.save(maps / f"{number}.png")
    paths = tiny_paths(tiny_model_dir, controlnets=(net,))
    words = [
        *("run", "--base-model", str(tiny_model_dir), "--image-encoder", str(paths.image_encoder)),
        *("--ip-adapter", str(paths.ip_adapter), "--backend", "eager", "--precision", "fp32", "--style", "none"),
        *("--steps", "2", "--iterations", "1", "--seed", "3", "--prompt", "a fox", "an owl", "a wolf", "--quiet"),
        *("--controlnet", f"{net}:0.8:0-0.9", "--control-images", str(maps), "--out", str(tmp_path / "out")),
    ]
    assert main(words) == 0
    pipeline = api.open_checkpoint(Checkpoint.open(paths), backend="eager")
    with (
        served(pipeline, tmp_path, LIMITS, pixels=64, max_frames=None) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        sent_maps = [sent(client, (maps / f"{number}.png").read_bytes()) for number in range(2)]
        guided = [
            {"prompt": prompt, "control": name} for prompt, name in zip(("a fox", "an owl"), sent_maps, strict=True)
        ]
        settings = SETTINGS | {"controls": [{"scale": 0.8, "end": 0.9}]}
        asked = {"prompts": [*guided, "a wolf"], "settings": settings}
        story = finished(client, client.post("/v1/stories", json=asked))
        swapped = [{**frame, "control": name} for frame, name in zip(guided, sent_maps[::-1], strict=True)]
        other = finished(client, client.post("/v1/stories", json=asked | {"prompts": [*swapped, "a wolf"]}))

        def frames(name: str, iteration: int) -> list[bytes]:
            at = f"/v1/stories/{name}/iterations/{iteration}/frames"
            return [client.get(f"{at}/{frame}.png").content for frame in range(3)]

        for iteration in range(2):
            for number, found in enumerate(frames(story, iteration)):
                of_run = (tmp_path / f"out/iteration-{iteration:02}/frame-{number:03}.png").read_bytes()
                assert (picture(found) == picture(of_run)).all()

        def same(one: str, two: str) -> list[bool]:
            pairs = zip(frames(one, 0), frames(two, 0), strict=True)
            return [bool((picture(first) == picture(second)).all()) for first, second in pairs]

        assert same(story, other) == [False, False, True]
        change = {"frames": {"1": {"prompt": "a snail"}}}
        edited = finished(client, client.post(f"/v1/stories/{story}/edits", json=change))
        assert same(edited, story) == [True, False, True]
        two = asked | {"settings": SETTINGS | {"controls": [{}, {}]}}
        refused = client.post("/v1/stories", json=two)
        assert (refused.status_code, refused.json()["field"]) == (422, "controlnet")

        # an edit that swaps one picture and takes away the other, beside stories that have it so from the first
        plain = finished(client, client.post("/v1/stories", json=asked | {"prompts": ["a fox", "an owl", "a wolf"]}))
        change = {"frames": {"0": {"control": sent_maps[1]}, "1": {"control": None}}}
        edited = finished(client, client.post(f"/v1/stories/{story}/edits", json=change))
        assert same(edited, story) == [False, False, True]
        found, swapped_so, plain_so = (
            [Image.open(BytesIO(data)) for data in frames(name, 0)] for name in (edited, other, plain)
        )
        assert max(errors_of_frames(found[:2], [swapped_so[0], plain_so[1]])) < 0.05
        assert min(errors_of_frames(found[:2], [plain_so[0], swapped_so[1]])) > 5

        def refused_edit(control: object, of: str = story) -> tuple[int, str | None, str]:
            change = {"frames": {"0": {"control": control}}}
            problem = client.post(f"/v1/stories/{of}/edits", json=change).json()
            return problem["status"], problem.get("field"), problem["detail"]

        anothers = Uploads(tmp_path / "uploads", 1).add("bo", png()).id
        for name in ("0" * 32, anothers):
            detail = f"there is no upload {name}; expected an id of /v1/uploads"
            assert refused_edit(name) == (422, "control", detail)
        assert refused_edit(str(maps / "0.png"))[0] == 422
        expected = "frame 0 has 2 control pictures; expected 1: one for each controlnet, null for none"
        assert refused_edit([sent_maps[1], None]) == (422, "controlnet", expected)
        for name, control in ((story, sent_maps[0]), (plain, None)):
            assert refused_edit(control, name)[2].startswith("frame 0 would be drawn as it is; expected ")
        client.delete(f"/v1/uploads/{sent_maps[0]}")
        change = {"frames": {"1": {"seed": 8}}}
        gone = client.post(f"/v1/stories/{story}/edits", json=change).json()
        assert gone["detail"] == f"there is no upload {sent_maps[0]}; expected an id of /v1/uploads"


@pytest.mark.parametrize(
    ("data", "kind", "status", "detail"),
    [
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "image/svg+xml",
            422,
            "the picture is no picture that can be read",
        ),
        (b"", "image/png", 422, "the picture is no picture that can be read; expected a picture"),
        (png()[:60], "image/png", 422, "the picture can't be read: "),
        (claimed(12_000, 9_000, bytes(1501 * 9_000)), "image/png", 422, "the picture has 12,000x9,000 pixels"),
        (claimed(60_000, 60_000), "image/png", 422, "the picture has"),
        (claimed(4_000, 4_000, b"few"), "image/png", 422, "the picture can't be read: "),
        (png(), "text/html", 415, "the body isn't a picture; expected Content-Type: image/png"),
        (bytes(1 << 21), "image/png", 413, "the body has more than 1048576 bytes"),
    ],
    ids=["svg", "empty", "truncated", "bomb", "claims more", "lies", "html", "long"],
)
def test_what_is_no_picture_or_too_large_is_refused(
    client: httpx.Client, data: bytes, kind: str, status: int, detail: str
) -> None:
    answer = client.post("/v1/uploads", content=data, headers={"Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["detail"].startswith(detail), answer.json()["detail"]


@pytest.mark.parametrize("name", ["0" * 32, "../../etc/passwd", "/etc/passwd"])
def test_only_uploads_of_the_same_key_are_attended_to(client: httpx.Client, name: str) -> None:
    frame = {"prompt": "a fox", "references": [name]}
    answer = client.post("/v1/stories", json={"prompts": [frame], "settings": SETTINGS})
    assert answer.status_code == 422 and "references" in answer.json()["field"]


def test_frames_of_a_finished_story_are_drawn_again(client: httpx.Client) -> None:
    def frames(story: str, iteration: int) -> list[bytes]:
        return [client.get(f"/v1/stories/{story}/iterations/{iteration}/frames/{n}.png").content for n in range(3)]

    first = finished(client, client.post("/v1/stories", json=ASKED))
    before = [frames(first, iteration) for iteration in range(2)]
    asked = {"frames": {"1": {"prompt": "a wolf runs", "seed": 8}}}
    second = finished(client, client.post(f"/v1/stories/{first}/edits", json=asked))
    told = client.get(f"/v1/stories/{second}").json()
    assert (told["edit_of"], told["prompts"][1], told["frames_done"]) == (first, "a wolf runs", 6)
    for old, new in zip(before, [frames(second, iteration) for iteration in range(2)], strict=True):
        assert [one == two for one, two in zip(old, new, strict=True)] == [True, False, True]
    assert [frames(first, iteration) for iteration in range(2)] == before
    asked = {"frames": {"1": {"seed": None}}}  # the story's, with the words of the edit
    again = finished(client, client.post(f"/v1/stories/{second}/edits", json=asked))
    record = client.get(f"/v1/stories/{again}/story.json").json()
    assert record["identity"]["story"]["prompts"][1] == "a wolf runs"
    all_of_them = {"frames": {"1": {"prompt": "a wolf runs", "seed": 8}}, "follow": True}
    third = finished(client, client.post(f"/v1/stories/{first}/edits", json=all_of_them))
    assert [one == two for one, two in zip(frames(third, 1), before[1], strict=True)] == [False] * 3


def test_what_cannot_be_edited_is_told(client: httpx.Client) -> None:
    story = finished(client, client.post("/v1/stories", json=ASKED))

    def refused(asked: dict, name: str = story) -> tuple[int, str | None, str]:
        answer = client.post(f"/v1/stories/{name}/edits", json=asked)
        problem = answer.json()
        return answer.status_code, problem.get("field"), problem["detail"]

    assert refused({"frames": {"7": {"prompt": "x"}}}) == (422, "frame", "frame is 7; expected 0 to 2")
    status, _, detail = refused({"frames": {"0": {"prompt": ASKED["prompts"][0]}}})
    assert status == 422 and "would be drawn as it is" in detail
    assert refused({"frames": {}})[:2] == (422, "frames")
    assert refused({"frames": {"0": {"prompt": " "}}})[0] == 422
    assert refused({"frames": {"0": {"prompt": None}}})[:2] == (422, "frames.0.prompt")
    picture = {"frames": {"0": {"control": sent(client, png())}}}
    assert refused(picture)[2].startswith("the story has control pictures, and there is no ControlNet; expected ")
    assert refused({"frames": {"0": {"prompt": "x"}}}, "none")[0] == 404
    waiting = [client.post("/v1/stories", json=ASKED).json()["id"] for _ in range(3)][-1]
    client.delete(f"/v1/stories/{waiting}")
    assert refused({"frames": {"0": {"prompt": "x"}}}, waiting)[:2] == (409, "story")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_picture_is_its_keys_alone_and_kept_as_long_as_a_story_needs_it(
    anyio_backend: str, pipeline: StoryPipeline, tmp_path: Path, keys: Keys
) -> None:
    stories = stories_of(pipeline, tmp_path, replace(LIMITS, limit_uploads=2))
    app = Gate(make_app(stories, keys, DEFAULTS), keys=keys, hosts=("here",), limits=stories.limits)
    ada, bo = ({"Authorization": f"Bearer {key}"} for key in ("secret", "secret2"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        needed, other = [
            (await client.post("/v1/uploads", content=png(colour=colour), headers=PNG | ada)).json()["id"]
            for colour in ("red", "blue")
        ]
        more = await client.post("/v1/uploads", content=png(colour="green"), headers=PNG | ada)
        assert (more.status_code, more.json()["detail"]) == (429, "2 pictures of this key are kept; remove some")
        asked = {"prompts": [{"prompt": "a fox", "references": [needed]}], "settings": SETTINGS}
        assert (await client.post("/v1/stories", json=asked, headers=bo)).status_code == 422
        assert (await client.delete(f"/v1/uploads/{needed}", headers=bo)).status_code == 404
        assert (await client.post("/v1/stories", json=asked, headers=ada)).status_code == 202
        assert (await client.delete(f"/v1/uploads/{needed}", headers=ada)).status_code == 409
        for name in (needed, other):
            os.utime(stories.uploads.folder("ada") / name, (1, 1))
        await stories.expire()
        assert [stories.uploads.holds("ada", name) for name in (needed, other)] == [True, False]
    stories.queue.close()
