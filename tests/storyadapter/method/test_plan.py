import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError
from storyadapter.method.plan import SEED_LIMIT, RunPlan, split_evenly


@given(st.integers(1, 500), st.integers(1, 100))
def test_split_evenly(frames: int, max_frames: int) -> None:
    batches = split_evenly(frames, max_frames)
    sizes = [len(batch) for batch in batches]
    assert [frame for batch in batches for frame in batch] == list(range(frames))
    assert max(sizes) <= max_frames and max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-frames // max_frames)  # no more than are needed
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("frames", "most", "split"), [(7, 4, [4, 3]), (10, 8, [5, 5]), (3, 8, [3]), (5, 1, [1] * 5)])
def test_splits_named_in_the_documentation(frames: int, most: int, split: list[int]) -> None:
    assert [len(batch) for batch in split_evenly(frames, most)] == split


def test_the_published_plan() -> None:
    plan = RunPlan(height=1024, width=1024, seed=0)
    assert plan.iterations == 11
    assert [plan.scale_of(iteration) for iteration in (0, 1, 10)] == [None, 0.3, 0.5]
    assert (plan.steps, plan.guidance, plan.guided) == (50, 5.0, True)
    assert plan.unet_rows(100) == 100 * 11 * 50 * 2
    assert RunPlan(height=1024, width=1024, seed=0, guidance=1.0).unet_rows(100) == 100 * 11 * 50


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"height": 1000}, "--height is 1000; expected a multiple of 32, such as 992 or 1024"),
        ({"width": 0}, "--width is 0; "),
        ({"seed": -1}, "--seed is -1; "),
        ({"seed": SEED_LIMIT}, "--seed is 9223372036854775808; expected 0 to 2^63 - 1"),
        ({"scales": (0.3, 2.01)}, "--scales has 2.01; expected each λ from 0 to 2"),
        ({"scales": (float("nan"),)}, "--scales has nan; "),
        ({"steps": 0}, "--steps is 0; expected 1 to 999 with --scheduler ddim"),
        ({"steps": 1001, "scheduler": "euler"}, "--steps is 1001; expected 1 to 1000 with --scheduler euler"),
        ({"scheduler": "heun"}, "--scheduler is heun; expected one of ddim, euler, dpmpp_2m, lcm"),
        ({"guidance": float("inf")}, "--guidance is inf; expected 0 to 100"),
        ({"max_frames": 0}, "--max-frames is 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_served(wrong: dict, reason: str) -> None:
    with pytest.raises(InputError) as error:
        RunPlan(**{"height": 1024, "width": 1024, "seed": 0, **wrong})
    assert typed(error.value).startswith(reason)


def test_the_limits_can_be_served() -> None:
    plan = RunPlan(height=32, width=2048, seed=SEED_LIMIT - 1, scales=(0.0, 2.0), steps=1, guidance=0, max_frames=1)
    assert plan.as_dict()["scales"] == [0.0, 2.0]
