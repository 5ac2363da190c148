"""How a worker puts batches on their way: beside each other, and where the memory doesn't suffice."""

import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import RunError
from storyadapter.method.events import Event, FrameFinished, IterationFinished, MicroBatchHalved, StepFinished
from storyadapter.model.networks import Networks
from storyadapter.runtime.batches import BatchLost
from storyadapter.runtime.pipeline import FinishedIteration
from storyadapter.runtime.scheduler import TRIES, Scheduler
from tests.storyadapter.runtime.replaced import ShortOfMemory, SmallMemory, with_networks

STORY = Story(tuple(f"a fox and {number} owls" for number in range(7)), style="none")
PLAN = RunPlan(height=64, width=64, seed=3, steps=2, scales=(0.3, 0.5), max_frames=3)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint) -> StoryPipeline:
    return StoryPipeline(open_networks(checkpoint), checkpoint.load_tokenizers())


def other(pipeline: StoryPipeline, networks: Networks, overlapped: bool = False) -> StoryPipeline:
    tokenizers = (pipeline.tokenizers.first, pipeline.tokenizers.second)
    return StoryPipeline(networks, tokenizers, overlapped=overlapped)


def run(pipeline: StoryPipeline, plan: RunPlan = PLAN, resume: FinishedIteration | None = None) -> list[Event]:
    return list(pipeline.run(STORY, plan, resume=resume))


def frames(events: list[Event]) -> list[tuple[int, int, bytes]]:
    return [(e.iteration, e.frame, e.picture.tobytes()) for e in events if isinstance(e, FrameFinished)]


def difference(events: list[Event], others: list[Event]) -> int:
    """The largest difference of any byte of any picture."""
    pairs = zip(frames(events), frames(others), strict=True)
    values = [(np.frombuffer(a, np.uint8).astype(int), np.frombuffer(b, np.uint8)) for (*_, a), (*_, b) in pairs]
    return max(int(np.abs(a - b).max()) for a, b in values)


@pytest.fixture(scope="module")
def expected(pipeline: StoryPipeline) -> list[Event]:
    return run(pipeline)


def test_overlapped_it_draws_the_same_in_the_same_order(pipeline: StoryPipeline, expected: list[Event]) -> None:
    threads = threading.active_count()
    events = run(other(pipeline, pipeline.networks, overlapped=True))
    assert [place for *place, _ in frames(events)] == [[i, f] for i in range(3) for f in range(7)]
    assert difference(events, expected) <= 1  # the image encoder's calls have other sizes
    drawn = [[len(batch) for batch in e.batches] for e in events if isinstance(e, IterationFinished)]
    assert drawn == [[3, 2, 2]] * 3
    for e in events:
        if isinstance(e, IterationFinished):
            assert set(e.seconds) == {"references", "denoise", "decode"}
    assert threading.active_count() == threads
    ours = [e for e in events if isinstance(e, FrameFinished) and e.iteration == 0]
    rest = run(
        other(pipeline, pipeline.networks, overlapped=True), resume=FinishedIteration(0, [e.picture for e in ours])
    )
    assert frames(rest) == [frame for frame in frames(events) if frame[0] > 0]


def test_a_run_that_is_left_early_leaves_no_threads(pipeline: StoryPipeline) -> None:
    threads = threading.active_count()
    events = other(pipeline, pipeline.networks, overlapped=True).run(STORY, PLAN)
    next(event for event in events if isinstance(event, FrameFinished))
    events.close()
    assert threading.active_count() == threads


def test_runs_of_one_pipeline_may_be_interleaved(pipeline: StoryPipeline, expected: list[Event]) -> None:
    plan = replace(PLAN, seed=4)
    alone = run(pipeline, plan)
    pairs = list(zip(pipeline.run(STORY, PLAN), pipeline.run(STORY, plan), strict=True))
    assert frames([one for one, _ in pairs]) == frames(expected)
    assert frames([two for _, two in pairs]) == frames(alone)


def test_room_for_later_references_changes_nothing(pipeline: StoryPipeline, expected: list[Event]) -> None:
    roomy = other(pipeline, replace(pipeline.networks, padding_is_free=True))
    assert difference(run(roomy), expected) <= 1


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_micro_batch_that_does_not_fit_is_halved(pipeline: StoryPipeline, overlapped: bool) -> None:
    small = SmallMemory(pipeline.networks["denoiser"], rows=2 * 2)
    networks = with_networks(pipeline.networks, denoiser=small)
    events = run(other(pipeline, networks, overlapped), replace(PLAN, max_frames=7))
    halvings = [event for event in events if isinstance(event, MicroBatchHalved)]
    assert halvings == [MicroBatchHalved(0, range(7), 4), MicroBatchHalved(0, range(4), 2)]
    drawn = [[len(batch) for batch in e.batches] for e in events if isinstance(e, IterationFinished)]
    assert drawn == [[2, 2, 2, 1]] * 3  # and it isn't tried again
    assert small.asked[:2] == [14, 8] and max(small.asked[2:]) == 4
    plain = run(other(pipeline, pipeline.networks, overlapped), replace(PLAN, max_frames=2))
    assert frames(events) == frames(plain)
    steps = [(e.iteration, e.frames.start, e.step) for e in events if isinstance(e, StepFinished)]
    assert steps == [(e.iteration, e.frames.start, e.step) for e in plain if isinstance(e, StepFinished)]


def test_a_story_that_runs_out_in_its_middle_goes_on(pipeline: StoryPipeline, expected: list[Event]) -> None:
    """The first micro-batch fits, a later one doesn't: what is drawn isn't drawn again."""

    class Shrinking(SmallMemory):
        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.rows = 6 if len(self.asked) < 3 else 2
            return super().__call__(inputs)

    networks = with_networks(pipeline.networks, denoiser=Shrinking(pipeline.networks["denoiser"], 6))
    events = run(other(pipeline, networks))
    drawn = [[len(batch) for batch in e.batches] for e in events if isinstance(e, IterationFinished)]
    assert drawn == [[3, 1, 1, 1, 1], [1] * 7, [1] * 7]
    assert [place for *place, _ in frames(events)] == [[i, f] for i in range(3) for f in range(7)]
    assert difference(events, expected) <= 1


@pytest.mark.parametrize("overlapped", [False, True])
def test_frames_are_decoded_in_parts_that_fit(pipeline: StoryPipeline, expected: list[Event], overlapped: bool) -> None:
    small = SmallMemory(pipeline.networks["vae_decoder"], rows=1)
    events = run(other(pipeline, with_networks(pipeline.networks, vae_decoder=small), overlapped))
    assert small.asked == [3, 2] + [1] * 21
    assert not [event for event in events if isinstance(event, MicroBatchHalved)]
    assert difference(events, expected) <= 1


def test_a_frame_that_cannot_be_decoded_beside_other_work_is_decoded_alone(
    pipeline: StoryPipeline, expected: list[Event]
) -> None:
    class Crowded(SmallMemory):
        """There is room once what is kept for speed alone is gone, and no more after that with three frames."""

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.rows = 0 if len(self.asked) < 3 else 1
            return super().__call__(inputs)

    class Forgetful:
        forgotten = 0

        def __call__(self, key, step) -> None:
            step()

        def forget(self) -> None:
            self.forgotten += 1

    runner = Forgetful()
    crowded = Crowded(pipeline.networks["vae_decoder"], 0)
    networks = with_networks(replace(pipeline.networks, run_step=runner), vae_decoder=crowded)
    events = run(other(pipeline, networks))
    assert [e for e in events if isinstance(e, MicroBatchHalved)] == [MicroBatchHalved(0, range(3), 2)]
    assert runner.forgotten == 2
    drawn = [[len(batch) for batch in e.batches] for e in events if isinstance(e, IterationFinished)]
    assert drawn == [[3, 2, 2], [2, 2, 2, 1], [2, 2, 2, 1]]
    assert difference(events, expected) <= 1


def test_frames_that_cannot_be_decoded_alone_are_an_error_and_no_frame_is_told_twice(pipeline: StoryPipeline) -> None:
    class Gone(SmallMemory):
        """One frame fits beside other work, then none, not even alone; later there would be room again."""

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.rows = 0 if len(self.asked) in (3, 4) else 1
            return super().__call__(inputs)

    gone = Gone(pipeline.networks["vae_decoder"], 0)
    told = []
    with pytest.raises(torch.OutOfMemoryError, match="a single frame can't be decoded"):
        for event in other(pipeline, with_networks(pipeline.networks, vae_decoder=gone)).run(STORY, PLAN):
            if isinstance(event, FrameFinished):
                told.append((event.iteration, event.frame))
    assert gone.asked == [3, 2, 1, 1, 1] and told == [(0, 0)]


@pytest.mark.parametrize(
    ("network", "times", "overlapped"),
    [
        ("image_encoder", 1, False),
        ("image_encoder", 1, True),
        ("image_encoder", 2, True),  # beside other work, and again when that has ended
        ("reference_projection", 1, False),
        ("reference_projection", 1, True),
    ],
)
def test_references_that_do_not_fit_at_first_are_made_again(
    pipeline: StoryPipeline, expected: list[Event], network: str, times: int, overlapped: bool
) -> None:
    short = ShortOfMemory(pipeline.networks[network], times)
    events = run(other(pipeline, with_networks(pipeline.networks, **{network: short}), overlapped))
    assert short.times == 0
    told = [(event.iteration, event.frame) for event in events if isinstance(event, FrameFinished)]
    assert sorted(told) == told and len(set(told)) == len(told)
    assert difference(events, expected) <= 1


@pytest.mark.parametrize("network", ["denoiser", "vae_decoder"])
def test_a_frame_that_does_not_fit_alone_is_an_error(pipeline: StoryPipeline, network: str) -> None:
    small = SmallMemory(pipeline.networks[network], rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(other(pipeline, with_networks(pipeline.networks, **{network: small})))
    assert small.asked[-2:] == ([2, 2] if network == "denoiser" else [1, 1])


def test_a_frame_that_fits_alone_once_memory_is_given_back_is_drawn(pipeline: StoryPipeline) -> None:
    class Full(SmallMemory):
        """No room for the second frame, until it is asked for again."""

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.rows = 0 if len(self.asked) == PLAN.steps else 2
            return super().__call__(inputs)

    full = Full(pipeline.networks["denoiser"], 0)
    plan = replace(PLAN, max_frames=1)
    events = run(other(pipeline, with_networks(pipeline.networks, denoiser=full)), plan)
    assert not [event for event in events if isinstance(event, MicroBatchHalved)]
    assert frames(events) == frames(run(other(pipeline, pipeline.networks), plan))


def test_a_batch_that_every_worker_dies_of_fails_its_story_with_the_reason(pipeline: StoryPipeline) -> None:
    scheduler, source = Scheduler(), pipeline.source(STORY, replace(PLAN, max_frames=2))
    scheduler.add(source)
    for _ in range(TRIES):
        assert source.error is None
        batch = scheduler.next_batch()
        assert [task.frame for task in batch.tasks] == [0, 1]
        scheduler.take(BatchLost(batch, RuntimeError("no power")))
    assert isinstance(source.error, RunError)
    assert str(source.error) == "iteration 0, frames 0, 1: 3 workers were lost that drew them, the last with: no power"
