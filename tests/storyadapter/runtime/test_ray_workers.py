"""Stories on Ray actors: the pictures of one process, whatever dies."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGKILL

import psutil
import pytest

from storyadapter import Checkpoint, LocalExecutor, RunPlan, Story, StoryPipeline, api
from storyadapter.bench.kills import kill_and_resume
from storyadapter.method.errors import EngineMismatchError, InputError, RunError
from storyadapter.method.events import Event, FrameFinished, IterationFinished, StepFinished
from storyadapter.runtime.pipeline import Pipeline
from tests.storyadapter.runtime.test_executor import assert_same, pictures

pytestmark = pytest.mark.cluster

STORY = Story(tuple(f"a fox and {number} owls" for number in range(5)), style="none")
PLAN = RunPlan(height=64, width=64, seed=3, steps=2, scales=(0.4,), max_frames=1)


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> StoryPipeline:
    return api.open_checkpoint(checkpoint, backend="eager")


@pytest.fixture(scope="module")
def workers(checkpoint: Checkpoint) -> Iterator[Pipeline]:
    pipeline = api.open_workers(checkpoint, workers=2, backend="eager")
    yield pipeline
    pipeline.close()


def same_bytes(events: list[Event], others: list[Event]) -> bool:
    mine, theirs = pictures(events), pictures(others)
    return mine.keys() == theirs.keys() and all((mine[place] == theirs[place]).all() for place in mine)


def run(pipeline: Pipeline, plan: RunPlan, on_event: Callable[[Event], None] = lambda event: None) -> list[Event]:
    events = []
    for event in pipeline.run(STORY, plan):
        events.append(event)
        on_event(event)
    return events


def test_frame_by_frame_the_pictures_are_those_of_one_process_to_the_byte(
    alone: StoryPipeline, workers: Pipeline
) -> None:
    assert same_bytes(run(workers, PLAN), run(alone, PLAN))


def test_nobody_else_can_reach_them(workers: Pipeline) -> None:
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [found for found in psutil.net_connections("inet") if found.status == psutil.CONN_LISTEN]
    addresses = [found.laddr.ip.removeprefix("::ffff:") for found in listening if found.pid in ours]
    assert len(addresses) > 5 and set(addresses) == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_iteration_is_split_so_that_all_workers_end_together(alone: StoryPipeline, workers: Pipeline) -> None:
    plan = replace(PLAN, max_frames=8, scales=())
    events = run(workers, plan)
    finished = [event for event in events if isinstance(event, IterationFinished)]
    assert [[len(batch) for batch in event.batches] for event in finished] == [[3, 2]]
    assert_same(events, run(alone, plan))


def test_a_killed_worker_costs_time_and_no_frame(alone: StoryPipeline, workers: Pipeline) -> None:
    expected = run(alone, PLAN)
    steps = 0

    def kill(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, StepFinished)
        if isinstance(event, StepFinished) and steps in (3, 13):
            os.kill(workers.processes[0], SIGKILL)

    before = workers.restarts
    events = run(workers, PLAN, kill)
    assert same_bytes(events, expected)
    assert len([event for event in events if isinstance(event, FrameFinished)]) == 10
    assert workers.restarts - before == 2


def test_stories_are_drawn_together_and_cancelled_on_workers(alone: StoryPipeline, workers: Pipeline) -> None:
    with LocalExecutor(workers) as executor:
        kept, dropped = executor.submit(STORY, PLAN), executor.submit(STORY, replace(PLAN, steps=40, seed=4))
        next(iter(dropped))
        dropped.cancel()
        with pytest.raises(CancelledError):
            list(dropped)
        assert same_bytes(list(kept), run(alone, PLAN))


def test_what_a_worker_cannot_open_is_told_as_here(checkpoint: Checkpoint, workers: Pipeline, tmp_path: Path) -> None:
    import ray

    from storyadapter.runtime.ray_workers import Actor, RayWorker

    opening = partial(api.open_checkpoint, checkpoint, backend="onnxruntime", engine_dir=tmp_path)
    worker = RayWorker(lambda: ray.remote(num_cpus=0)(Actor).remote(opening, 1), workers._accept)
    while worker.error is None:
        worker.advance()
    assert isinstance(worker.error, EngineMismatchError) and "build it" in str(worker.error)
    with pytest.raises(RunError, match="^no worker is left; the last: no engine in"):
        worker.advance()


def test_a_worker_with_another_model_is_refused(workers: Pipeline) -> None:
    with pytest.raises(InputError, match="^a worker has another model: other; expected"):
        workers._accept(workers.networks, "other", workers.sampling)


def test_ray_that_would_listen_to_others_is_refused() -> None:
    program = "import ray, storyadapter.api as api; api.open_ray(None, None, workers=1)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    assert "InputError: Ray was imported before workers were opened, and would listen on every" in ended.stderr


def test_a_driver_is_killed_and_resumed(tiny_model_dir: Path, tmp_path: Path) -> None:
    words = [
        *("run", "--base-model", str(tiny_model_dir), "--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "eager", "--workers", "2"),
        *("--max-frames", "1", "--iterations", "2", "--steps", "5", "--seed", "3", "--prompt", *STORY.prompts),
    ]
    found = kill_and_resume(words, tmp_path, kills=1, max_frames=2)
    assert found.problems == [] and found.killed == 1
