"""Many stories at once: each draws what it draws alone, in fewer calls, and none disturbs another."""

import asyncio
import math
import random
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import InputError, RunError
from storyadapter.method.events import Event, FrameFinished, IterationFinished, RunFinished, StepFinished
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.runtime.drive import drive
from storyadapter.runtime.executor import LocalExecutor, SubmittedStory
from storyadapter.runtime.story_source import StorySource
from tests.storyadapter.runtime.replaced import CountingNetwork, counting, with_networks

BASE = RunPlan(height=64, width=64, seed=3, steps=3, scales=(0.3, 0.5), max_frames=3)
# different lengths, seeds, prompts, guidance and λ; the third has no guidance, and so batches of its own
STORIES = (
    (Story(tuple(f"a fox and {n} owls" for n in range(4)), style="none"), BASE),
    (
        Story(("a bear", "a wolf"), style="none"),
        replace(BASE, seed=8, guidance=2.5, scales=(0.4,), negative_prompt="fog"),
    ),
    (Story(("snow", "a red fox", "night"), style="none"), replace(BASE, seed=9, guidance=1.0, scales=(0.5, 0.6))),
)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint, tiny_engine_dir: Path) -> StoryPipeline:
    """In fp32 by ONNX Runtime, whose rows hardly depend on their neighbours: what is left is the runtime's doing. (By
    eager on a CPU, a byte that is rounded otherwise in one iteration costs 20 dB in the next, as references multiply
    it: a lone story differs as much from itself in batches of another size.)"""
    networks = open_networks(checkpoint, backend="onnxruntime", engine_dir=tiny_engine_dir)
    return StoryPipeline(networks, checkpoint.load_tokenizers())


def other(pipeline: StoryPipeline, **changes: object) -> StoryPipeline:
    tokenizers = (pipeline.tokenizers.first, pipeline.tokenizers.second)
    return StoryPipeline(replace(pipeline.networks, **changes), tokenizers)


def pictures(events: list[Event]) -> dict[tuple[int, int], np.ndarray]:
    return {(e.iteration, e.frame): np.asarray(e.picture, float) for e in events if isinstance(e, FrameFinished)}


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    error = np.square(one - two).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def assert_same(events: list[Event], alone: list[Event], at_least: float = 80.0) -> None:
    mine, theirs = pictures(events), pictures(alone)
    assert mine.keys() == theirs.keys()
    # a frame of 64x64 has 12,288 values, of which one that is rounded the other way costs 89 dB
    assert min(psnr(mine[place], theirs[place]) for place in mine) >= at_least


@pytest.fixture(scope="module")
def alone(pipeline: StoryPipeline) -> list[list[Event]]:
    return [list(pipeline.run(story, plan)) for story, plan in STORIES]


def drawn_together(pipeline: StoryPipeline, requests=STORIES) -> tuple[list[list[Event]], list[tuple[int, int]]]:
    """Events by story, and of each batch that ready tasks sufficed to fill: frames, and how many it could hold."""
    worker, sources = pipeline.worker(), [pipeline.source(story, plan) for story, plan in requests]
    told: dict[StorySource, list[Event]] = {source: [] for source in sources}
    filled = []
    start = worker.start

    def counted(batch) -> None:
        key = batch.tasks[0].job.batch_key
        left = [task for source in sources for task in source.ready if task.job.batch_key == key]
        capacity = min(source.batching.max_frames for source in sources)
        if len(left) + len(batch.tasks) >= capacity:
            filled.append((len(batch.tasks), capacity))
        start(batch)

    worker.start = counted
    for source, event in drive(lambda: (worker,), sources):
        told[source].append(event)
    return list(told.values()), filled


def test_three_stories_draw_what_each_draws_alone_in_fewer_calls(
    pipeline: StoryPipeline, alone: list[list[Event]]
) -> None:
    networks, calls = counting(pipeline.networks, "denoiser")
    counted = other(pipeline, by_name=networks.by_name)
    told, filled = drawn_together(counted)
    for events, expected in zip(told, alone, strict=True):
        assert_same(events, expected)
        assert isinstance(events[-1], RunFinished)
        finished = [event for event in events if isinstance(event, IterationFinished)]
        assert [e.iteration for e in finished] == [e.iteration for e in expected if isinstance(e, IterationFinished)]
        for event in finished:
            frames = sorted(frame for batch in event.batches for frame in batch)
            assert frames == list(range(len(frames)))
    together = calls["denoiser"]
    calls.clear()
    for story, plan in STORIES:
        list(counted.run(story, plan))
    assert together < calls["denoiser"]
    assert calls["denoiser rows"] == sum(plan.unet_rows(len(story.prompts)) for story, plan in STORIES)
    assert filled and sum(rows for rows, _ in filled) >= 0.9 * sum(capacity for _, capacity in filled)


def test_frames_that_have_no_guidance_share_no_batch_with_those_that_have(pipeline: StoryPipeline) -> None:
    rows: list[int] = []
    denoiser = pipeline.networks["denoiser"]

    class Looking:
        spec = denoiser.spec

        def __call__(self, inputs):
            rows.append(len(inputs["latents"]))
            return denoiser(inputs)

    short = tuple((story, replace(plan, scales=())) for story, plan in STORIES)
    told, _ = drawn_together(
        other(pipeline, by_name=with_networks(pipeline.networks, denoiser=Looking()).by_name), short
    )
    assert sorted(set(rows)) == [3, 6] and len(told) == 3  # three frames without guidance, twice three with it


def read(submitted: SubmittedStory) -> list[Event]:
    return list(submitted)


def test_submitted_from_several_threads(pipeline: StoryPipeline, alone: list[list[Event]]) -> None:
    threads = threading.active_count()
    with LocalExecutor(other(pipeline)) as executor, ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda request: read(executor.submit(*request)), STORIES))
    for events, expected in zip(told, alone, strict=True):
        assert_same(events, expected)
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="the executor is closed"):
        executor.submit(*STORIES[0])


def test_asyncio_goes_on_while_stories_are_drawn(pipeline: StoryPipeline, alone: list[list[Event]]) -> None:
    async def main() -> tuple[list[list[Event]], int]:
        turns, done = 0, asyncio.Event()

        async def count() -> None:
            nonlocal turns
            while not done.is_set():
                turns += 1
                await asyncio.sleep(0.01)

        async def read_all(submitted: SubmittedStory) -> list[Event]:
            return [event async for event in submitted]

        counter = asyncio.create_task(count())
        with LocalExecutor(other(pipeline)) as executor:
            told = await asyncio.gather(*(read_all(executor.submit(*request)) for request in STORIES))
        done.set()
        await counter
        return list(told), turns

    told, turns = asyncio.run(main())
    for events, expected in zip(told, alone, strict=True):
        assert_same(events, expected)
    assert turns > 5


def test_one_is_cancelled_and_one_fails_and_the_third_does_not_notice(
    pipeline: StoryPipeline, alone: list[list[Event]]
) -> None:
    (wolf, _) = pipeline.tokenizers.input_ids(["a wolf"])
    encoder = pipeline.networks["text_encoder"]

    class Poisoned(CountingNetwork):
        """Gives values that aren't finite for one prompt, that of the second story's last frame."""

        def __call__(self, inputs):
            outputs = super().__call__(inputs)
            is_wolf = (inputs["input_ids"] == wolf).all(1)
            return {name: value.masked_fill(is_wolf[:, None, None], torch.nan) for name, value in outputs.items()}

    networks = with_networks(pipeline.networks, text_encoder=Poisoned(encoder))
    with LocalExecutor(other(pipeline, by_name=networks.by_name)) as executor:
        third, second = executor.submit(*STORIES[0]), executor.submit(*STORIES[1])
        first = executor.submit(Story(tuple(f"an owl, {n}" for n in range(9))), replace(BASE, steps=30, seed=1))
        told = []
        with pytest.raises(CancelledError):
            for event in first:
                told.append(event)
                if isinstance(event, StepFinished):
                    first.cancel()
        assert first.has_ended
        with pytest.raises(RunError, match="frame 1: text encoder 1 gave values that are not finite in fp32"):
            list(second)
        assert_same(list(third), alone[0])


class Full:
    """A store without room."""

    stays = ()

    def kept_from(self):
        return 0

    def find(self, iteration, frame, key):
        return None

    def split(self, iteration):
        return None

    def begin_iteration(self, iteration, split):
        pass

    def save(self, frame) -> Future:
        future: Future = Future()
        future.set_exception(RunError("no room"))
        return future

    def finish_iteration(self, iteration, seconds, split):
        raise AssertionError("nothing was kept")


def test_of_equal_stories_one_is_drawn(pipeline: StoryPipeline, alone: list[list[Event]]) -> None:
    networks, calls = counting(pipeline.networks, "denoiser")
    counted = other(pipeline, by_name=networks.by_name)
    told, _ = drawn_together(counted, (STORIES[0], STORIES[1], STORIES[0]))
    for events, expected in zip(told, (alone[0], alone[1], alone[0]), strict=True):
        assert_same(events, expected)
    batches = [[e.batches for e in told[index] if isinstance(e, IterationFinished)] for index in (0, 2)]
    assert all(sorted(frame for batch in split for frame in batch) == [0, 1, 2, 3] for split in batches[1])
    rows = sum(plan.unet_rows(len(story.prompts)) for story, plan in STORIES[:2])
    assert calls["denoiser rows"] == rows


def test_a_story_that_waits_for_another_goes_on_when_that_is_cancelled(
    pipeline: StoryPipeline, alone: list[list[Event]]
) -> None:
    with LocalExecutor(other(pipeline)) as executor:
        first = executor.submit(*STORIES[0])
        next(event for event in first if isinstance(event, StepFinished))  # its first batch is under way
        second = executor.submit(*STORIES[0])
        with pytest.raises(CancelledError):
            for event in first:
                if isinstance(event, StepFinished):
                    first.cancel()
        assert_same(list(second), alone[0])


def test_a_story_that_waits_for_another_goes_on_when_that_cannot_be_kept(
    pipeline: StoryPipeline, alone: list[list[Event]]
) -> None:
    with LocalExecutor(other(pipeline)) as executor:
        bad, good = executor.submit(*STORIES[0], store=Full()), executor.submit(*STORIES[0])
        with pytest.raises(RunError, match="^no room$"):
            list(bad)
        assert_same(list(good), alone[0])


def test_what_cannot_be_served_is_refused_at_once_and_nobody_notices(
    pipeline: StoryPipeline, alone: list[list[Event]]
) -> None:
    built = other(pipeline, letters=ShapeRanges(8, 8, Range(64, 64), Range(64, 64)).letters())
    with LocalExecutor(built) as executor:
        good = executor.submit(*STORIES[1])
        with pytest.raises(InputError, match="96 asked for; this engine was built for 64 to 64"):
            executor.submit(STORIES[0][0], replace(BASE, height=96))
        with pytest.raises(InputError, match="unknown style"):
            executor.submit(*STORIES[0], style="baroque")
        assert_same(list(good), alone[1])


def test_closing_cancels_what_is_not_drawn(pipeline: StoryPipeline) -> None:
    executor = LocalExecutor(other(pipeline))
    submitted = [executor.submit(STORIES[0][0], replace(BASE, steps=40)) for _ in range(2)]
    next(iter(submitted[0]))
    executor.close()
    for story in submitted:
        with pytest.raises(CancelledError):
            list(story)


def test_a_frame_that_cannot_be_kept_stops_its_story_alone(pipeline: StoryPipeline, alone: list[list[Event]]) -> None:
    with LocalExecutor(other(pipeline)) as executor:
        bad, good = executor.submit(*STORIES[0], store=Full()), executor.submit(*STORIES[1])
        with pytest.raises(RunError, match="^no room$"):
            list(bad)
        assert_same(list(good), alone[1])


class Recorder:
    """Counts what graphs would be captured: one for each key, as long as it is kept."""

    def __init__(self) -> None:
        self.keys: dict[Hashable, None] = {}
        self.captures = 0

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        self.captures += key not in self.keys
        self.keys[key] = None
        step()

    def forget(self) -> None:
        self.keys.clear()


def test_random_mixes_of_stories_need_a_bounded_number_of_graphs(pipeline: StoryPipeline) -> None:
    recorder, chance = Recorder(), random.Random(0)
    mixed = other(pipeline, run_step=recorder, padding_is_free=True)
    counts = []
    for number in range(50):
        requests = [
            (
                Story(tuple(f"a fox, {n}" for n in range(chance.randint(1, 9))), style="none"),
                replace(
                    BASE,
                    steps=1,
                    seed=number,
                    scales=tuple(chance.choices((0.3, 0.4, 0.5), k=chance.randint(0, 1))),
                    guidance=chance.choice((1.0, 5.0, 5.0)),
                ),
            )
            for _ in range(chance.randint(1, 4))
        ]
        drawn_together(mixed, requests)
        counts.append(recorder.captures)
    # 4 sizes of batches with and without guidance, and a few times more room for texts and references
    assert counts[-1] <= 8 * 5
    assert counts[-1] - counts[24] <= 4  # and in the second half hardly any more
