from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.plan import SEED_LIMIT, RunPlan, guided_calls, split_evenly


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
        (
            {"scheduler": "heun"},
            "--scheduler is heun; expected one of ddim, euler, euler_a, dpmpp_2m, lcm, tcd, checkpoint",
        ),
        ({"timesteps": (749, 999)}, "--timesteps is 749,999; expected whole numbers from 999 to 0, each less than "),
        ({"timesteps": (1000,)}, "--timesteps is 1000; expected whole numbers from 999 to 0, each less than the one "),
        ({"timesteps": (999, 499), "steps": 4}, "--steps is 4; expected 2, as many as --timesteps has; leave it out"),
        ({"timestep_spacing": "even"}, "--timestep-spacing is even; expected one of leading, linspace, trailing"),
        ({"eta": 1.5}, "--eta is 1.5; expected 0 to 1"),
        ({"steps": (5, 5, 6)}, "--steps has 3 values; expected one, or 11: one per iteration, the text-only one first"),
        ({"steps": (5, 0), "scales": (0.3,)}, "--steps is 0; expected 1 to 999 with --scheduler ddim"),
        ({"guidance": (5.0, 101.0), "scales": (0.3,)}, "--guidance is 101; expected 0 to 100"),
        ({"strength": 0.0}, "--strength is 0; expected more than 0 and at most 1, and a share of 50 steps that is at "),
        ({"strength": 0.1, "steps": 4}, "--strength is 0.1; expected more than 0 and at most 1, and a share of 4 "),
        ({"guidance_interval": (0.5, 0.5)}, "--guidance-interval is 0.5:0.5; expected two shares of the steps from 0 "),
        (
            {"guidance_interval": (0.0, 0.5), "guidance": 1},
            "--guidance-interval without guidance above 1; there are ",
        ),
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


def test_the_number_of_time_steps_is_that_of_the_steps() -> None:
    assert RunPlan(height=64, width=64, seed=0, timesteps=(999, 749, 499, 249)).unet_rows(1) == 11 * 4 * 2


def test_what_is_typed_goes_before_what_the_model_says() -> None:
    plan, model = RunPlan(height=64, width=64, seed=0), ModelSampling("v_prediction", True, "a.json", "{}")
    decided = plan.for_model(model)
    assert (decided.prediction_type, decided.zero_terminal_snr, decided.scheduler_config) == ("v_prediction", True, "")
    assert decided.for_model(ModelSampling()) == decided
    typed = replace(plan, prediction_type="epsilon", zero_terminal_snr=False, scheduler="checkpoint").for_model(model)
    assert (typed.prediction_type, typed.zero_terminal_snr, typed.scheduler_config) == ("epsilon", False, "{}")
    other = RunPlan(height=96, width=64, seed=1)
    assert plan.for_model(ModelSampling()).sampler_in(0) == plan.sampler_in(9) == other.sampler_in(0)
    with pytest.raises(InputError, match="a.json says that the model predicts 'flow_prediction'; expected one of eps"):
        plan.for_model(ModelSampling("flow_prediction", source="a.json"))


def test_a_value_per_iteration() -> None:
    plan = RunPlan(height=64, width=64, seed=0, scales=(0.3, 0.4), steps=(20, 8, 4), guidance=(5.0, 1.0, 3.0))
    assert [plan.sampler_in(iteration).steps for iteration in range(3)] == [20, 8, 4]
    assert [plan.is_guided_in(iteration) for iteration in range(3)] == [True, False, True]
    assert plan.guided and plan.unet_rows(10) == 10 * (40 + 8 + 8)
    half = replace(plan, guidance_interval=(0.25, 0.75))
    assert half.unet_rows(10) == 10 * (30 + 8 + 6)
    weak = replace(half, strength=0.5)
    assert weak.unet_rows(10) == 10 * (30 + 4 + 3)
    calls = (20, 4, 2)
    for iteration in range(3):
        rows = [weak.rows_at(iteration, step) for step in range(1, calls[iteration] + 1)]
        assert sum(rows) == weak.rows_in(iteration) and max(rows) == (1 if iteration == 1 else 2)
    assert [weak.rows_at(0, step) for step in (5, 6, 15, 16)] == [1, 2, 2, 1]


def test_equal_values_are_one() -> None:
    plan = RunPlan(height=64, width=64, seed=0, scales=(0.3, 0.4), steps=(8, 8, 8), guidance=[5.0, 5.0, 5.0])
    assert plan == RunPlan(height=64, width=64, seed=0, scales=(0.3, 0.4), steps=8)


@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_an_interval_of_calls(calls: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    chosen = guided_calls((low, high), calls)
    assert 0 <= chosen.start <= chosen.stop <= calls
    assert guided_calls((0.0, 1.0), calls) == range(calls)
    assert len(chosen) + len(guided_calls((0.0, low), calls)) + len(guided_calls((high, 1.0), calls)) == calls
