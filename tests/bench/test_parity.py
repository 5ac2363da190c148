"""`bench parity` passes where a backend draws what eager draws, and fails where it draws something else."""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.__main__ import main
from storyadapter.bench import parity
from storyadapter.bench.parity_run import Drawer, Iteration, Pictures, measure, problems_of
from storyadapter.bench.report import Progress
from storyadapter.demo.vocabulary import FRAMES_AT_MOST
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import InputError
from storyadapter.method.events import Event
from storyadapter.runtime.psnr import EQUAL, passes

STORY = Story(("a red fox runs in the snow", "a small owl sleeps", "the fox and the owl share soup"), style="none")
PLAN = RunPlan(height=64, width=64, seed=3, steps=2, scales=(0.3, 0.5), max_frames=3)


@pytest.fixture(scope="module")
def drawer(checkpoint: Checkpoint) -> Drawer:
    networks = open_networks(checkpoint, backend="eager", device="cpu")
    return Drawer("eager", StoryPipeline(networks, checkpoint.load_tokenizers()), STORY, Progress(9))


@pytest.fixture(scope="module")
def expected(drawer: Drawer) -> Pictures:
    return drawer.draw(PLAN)


def _model(folder: Path) -> list[str]:
    adapter = str(folder / "ip-adapter.safetensors")
    return ["--base-model", str(folder), "--image-encoder", str(folder / "image_encoder"), "--ip-adapter", adapter]


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    return parser.parse_args(words)


def test_an_engine_draws_what_eager_draws(
    tiny_model_dir: Path,
    tiny_engine_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded: set[tuple[str, bool]] = set()
    run = StoryPipeline.run

    def noted(self: StoryPipeline, *args: Any, **options: Any) -> Iterator[Event]:
        for event in run(self, *args, **options):
            rounded.add((self.networks.backend, torch.backends.cudnn.allow_tf32))
            yield event

    monkeypatch.setattr(StoryPipeline, "run", noted)
    words = ["--backend", "onnxruntime", "--precision", "fp32", "--engine-dir", str(tiny_engine_dir)]
    words += [
        "--frames",
        "4",
        "--steps",
        "2",
        "--iterations",
        "2",
        "--max-frames",
        "3",
        "--out",
        str(tmp_path / "v1.2"),
    ]
    assert main(["bench", "parity", *_model(tiny_model_dir), *words]) == 0
    told = capsys.readouterr()
    assert rounded == {("eager", False), ("onnxruntime", True)}  # the reference alone is spared TF32
    assert "building" not in told.err  # the engine that build made serves
    assert re.findall(r"onnxruntime fp32, (.+): iteration (\d)", told.err) == [
        *(("free-running", number) for number in "012"),
        *(("same references", number) for number in "12"),
        ("same references, half the λ", "2"),
    ]
    data = json.loads((tmp_path / "v1.2.json").read_text(encoding="utf-8"))
    assert data["kind"] == "parity" and data["passed"] and data["problems"] == []
    assert [iteration["scale"] for iteration in data["iterations"]] == [None, 0.3, 0.5]
    for iteration in data["iterations"]:
        assert len(iteration["same_references"]) == len(iteration["free_running"]) == 4
        assert 50 <= min(iteration["same_references"]) < EQUAL  # another program's rounding is seen
    assert data["iterations"][0]["same_references"] == data["iterations"][0]["free_running"]
    assert data["iterations"][2]["same_references"] != data["iterations"][2]["free_running"]
    page = (tmp_path / "v1.2.md").read_text(encoding="utf-8")
    assert "| verdict | passed |" in page and page in told.out


def test_eager_is_equal_to_itself_and_half_the_scale_is_seen(drawer: Drawer, expected: Pictures) -> None:
    iterations, control = measure(drawer, PLAN, expected)
    for iteration in iterations:
        assert set(iteration.same_references) == set(iteration.free_running) == {EQUAL}
    assert not passes(control)
    assert problems_of(iterations, control) == []


def test_a_wrong_scale_in_every_iteration_fails(drawer: Drawer, expected: Pictures) -> None:
    halved = dataclasses.replace(PLAN, scales=tuple(scale / 2 for scale in PLAN.scales))
    iterations, control = measure(drawer, halved, expected)
    problems = problems_of(iterations, control)
    assert [problem[:31] for problem in problems] == [f"iteration {n}, same references: m" for n in (1, 2)]


def test_references_of_another_iteration_fail(drawer: Drawer, expected: Pictures) -> None:
    """What `draw_from` is given is what is attended to, and nothing else."""
    right = drawer.draw_from(expected, 2, PLAN)
    assert all(one.tobytes() == two.tobytes() for one, two in zip(right, expected[2], strict=True))
    iterations, control = measure(drawer, PLAN, [expected[0], expected[0], expected[2]])
    # iteration 1 is compared with the pictures of iteration 0, iteration 2 drawn from them
    assert [problem[:11] for problem in problems_of(iterations, control)] == ["iteration 1", "iteration 2"]


def test_the_verdict_in_words() -> None:
    good, dim, one_bad = [40.0, 34.0, 60.0], [39.9, 39.9, 60.0], [50.0, 33.9, 60.0]
    assert passes(good) and not passes(dim) and not passes(one_bad)
    # free-running pictures may drift apart
    assert problems_of([Iteration(None, good, good), Iteration(0.3, good, one_bad)], dim) == []
    assert problems_of([Iteration(None, dim, good), Iteration(0.3, one_bad, good)], good) == [
        "iteration 0, same references: median 39.9 dB, worst 39.9 dB",
        "iteration 1, same references: median 50.0 dB, worst 33.9 dB",
        "half the λ passes too (median 40.0 dB, worst 34.0 dB): the comparison sees nothing",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--frames", "0"), "--frames is 0; expected 1 or more"),
        (("--steps", "0"), "--steps is 0; expected 1 or more"),
        (("--iterations", "0"), "--iterations is 0; expected 1 or more"),
        (("--max-frames", "0"), "--max-frames is 0; expected 1 or more"),
        (("--frames", str(FRAMES_AT_MOST + 1)), f"expected {FRAMES_AT_MOST} or fewer"),
        (("--backend", "eager", "--precision", "fp32"), "eager in fp32 is what others are compared with"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parity.run(_arguments(*words))
