"""Clients are told which frames were decoded again in fp32."""

from pathlib import Path

import httpx

from storyadapter import Checkpoint, api
from storyadapter.bench.served import served
from storyadapter.model.numerics import Numerics
from tests.storyadapter.checkpoint.spoil import tiny_paths
from tests.storyadapter.runtime.test_decoding_again import scaled
from tests.storyadapter.serve.serving import LIMITS
from tests.storyadapter.serve.test_server import ASKED, events


def told(client: httpx.Client) -> tuple[list[bool], list[list[int]]]:
    """Of each frame by its event, and of each iteration in `story.json`."""
    name = client.post("/v1/stories", json=ASKED).json()["id"]
    by_event = {(e["iteration"], e["frame"]): e for _, kind, e in events(client, name) if kind == "frame_finished"}
    assert sorted(by_event) == [(iteration, frame) for iteration in range(2) for frame in range(3)]
    iterations = client.get(f"/v1/stories/{name}/story.json").json()["progress"]["iterations"]
    return [e["decoded_again"] for e in by_event.values()], [iteration["decoded_again"] for iteration in iterations]


def test_frames_that_overflowed(tiny_model_dir: Path, tmp_path: Path, client: httpx.Client) -> None:
    model = Checkpoint.open(tiny_paths(scaled(tiny_model_dir, tmp_path / "model", 30_000)))
    pipeline = api.open_checkpoint(model, backend="eager", numerics=Numerics.of("fp32", vae_decoder="fp16"))
    with (
        served(pipeline, tmp_path, LIMITS, pixels=64, max_frames=None) as address,
        httpx.Client(base_url=address, timeout=60) as other,
    ):
        assert told(other) == ([True] * 6, [[0, 1, 2]] * 2)
    assert told(client) == ([False] * 6, [[], []])
