"""A story on a GPU: nothing is copied inside the loop, graphs are shared, and decoding goes on beside the UNet."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.opening import open_networks
from storyadapter.method.events import FrameFinished, IterationFinished, MicroBatchHalved, RunStarted, StepFinished
from storyadapter.method.plan import FRAMES_AT_MOST
from storyadapter.model.networks import run_directly

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STORY = Story(tuple(f"a fox and {number} owls" for number in range(5)), style="none")
PLAN = RunPlan(height=64, width=64, seed=3, steps=4, scales=(0.3, 0.5), max_frames=3)


def opened(checkpoint: Checkpoint, runner: GraphStepRunner | None = None, **options: bool) -> StoryPipeline:
    networks = open_networks(checkpoint, backend="eager", device="cuda")
    # eager reads padding too, which is masked; here iteration 0 is only to have the shape of the later ones
    networks = replace(networks, run_step=runner or run_directly, padding_is_free=True)
    return StoryPipeline(networks, checkpoint.load_tokenizers(), **options)


def draw(pipeline: StoryPipeline, plan: RunPlan = PLAN) -> list[np.ndarray]:
    return [np.asarray(e.picture) for e in pipeline.run(STORY, plan) if isinstance(e, FrameFinished)]


@pytest.fixture
def told_when_the_host_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("told_when_the_host_waits")
@pytest.mark.parametrize("scheduler", ["ddim", "lcm"])
def test_nothing_is_copied_between_host_and_device_inside_the_loop(checkpoint: Checkpoint, scheduler: str) -> None:
    plan = replace(PLAN, scheduler=scheduler)
    pipeline = opened(checkpoint, GraphStepRunner(limit=4))
    draw(pipeline, plan)  # warms up and captures
    steps = 0
    for event in pipeline.run(STORY, plan):
        if isinstance(event, StepFinished):
            torch.cuda.set_sync_debug_mode("error")
            steps += 1
        if isinstance(event, IterationFinished):
            torch.cuda.set_sync_debug_mode("default")
    assert steps == 3 * 2 * 4


def test_the_mode_would_tell() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").cpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_draw_the_same_and_are_shared_over_iterations_and_stories(checkpoint: Checkpoint) -> None:
    runner = GraphStepRunner(limit=4)
    pipeline, plain = opened(checkpoint, runner), opened(checkpoint)
    expected = draw(pipeline)
    pairs = zip(draw(plain), expected, strict=True)
    assert max(np.abs(one.astype(int) - other).max() for one, other in pairs) <= 1
    assert runner.captures == 2  # of the micro-batches of 3 and of 2 frames, in whichever iteration
    draw(pipeline, replace(PLAN, seed=4, guidance=3.0, steps=6))
    assert runner.captures == 2
    assert all(np.array_equal(*pair) for pair in zip(draw(pipeline), expected, strict=True))


def test_overlapped_decoding_draws_the_same(checkpoint: Checkpoint) -> None:
    one, other = draw(opened(checkpoint)), draw(opened(checkpoint, overlapped=False))
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(one, other, strict=True)) <= 1


def test_a_story_that_is_left_early_can_be_begun_again(checkpoint: Checkpoint) -> None:
    pipeline = opened(checkpoint, GraphStepRunner(limit=4))
    expected = draw(pipeline)
    for event in pipeline.run(STORY, PLAN):
        if isinstance(event, StepFinished) and event.iteration == 1:
            break
    assert all(np.array_equal(*pair) for pair in zip(draw(pipeline), expected, strict=True))


def test_steps_are_told_in_order_and_stages_are_timed(checkpoint: Checkpoint) -> None:
    events = list(opened(checkpoint, GraphStepRunner(limit=4)).run(STORY, PLAN))
    assert isinstance(events[0], RunStarted)
    steps = [(e.iteration, e.frames.start, e.step) for e in events if isinstance(e, StepFinished)]
    assert steps == sorted(steps) and len(steps) == 3 * 2 * 4
    finished = [event for event in events if isinstance(event, IterationFinished)]
    assert all(set(event.seconds) == {"references", "denoise", "decode"} for event in finished)
    assert all(seconds > 0 for event in finished for seconds in event.seconds.values())


def test_frames_are_split_by_the_memory_that_is_free(checkpoint: Checkpoint) -> None:
    pipeline = opened(checkpoint)
    small, large = (
        pipeline.batching(replace(PLAN, height=side, width=side, max_frames=None), 40) for side in (64, 512)
    )
    assert small.max_frames == FRAMES_AT_MOST  # on any GPU that there is
    assert small.needs and large.needs
    for name in ("per_frame", "decode"):
        assert getattr(large.needs, name) > 4 * getattr(small.needs, name)
    assert len(draw(pipeline, replace(PLAN, max_frames=None))) == 15


def test_a_gpu_with_little_memory_draws_the_same(checkpoint: Checkpoint) -> None:
    """The allocator is really given less than the micro-batch that is asked for takes."""
    plan = replace(PLAN, height=512, width=512, steps=3, scales=(0.4,), max_frames=5)
    plain = opened(checkpoint)
    expected, needs = draw(plain, plan), plain.batching(plan, 5).needs
    del plain
    pipeline = opened(checkpoint, GraphStepRunner())
    pipeline.batching(plan, 5)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    limit = torch.cuda.memory_reserved() + needs.fixed + needs.decode + 2.5 * needs.per_frame
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        events = list(pipeline.run(STORY, plan))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [event for event in events if isinstance(event, MicroBatchHalved)]
    drawn = [np.asarray(event.picture) for event in events if isinstance(event, FrameFinished)]
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(drawn, expected, strict=True)) <= 2
