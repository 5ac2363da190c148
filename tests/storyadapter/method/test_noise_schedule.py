"""Time steps and noise levels against diffusers' own schedulers, to the bit."""

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storyadapter.method.errors import InputError
from storyadapter.method.noise_schedule import DEFAULTS, default_spacing, noise_schedule
from storyadapter.method.sampler import table_from_scheduler

SOLVERS = ("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_configuration_says_by_saying_nothing(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == DEFAULTS[name]


def test_the_spacing_of_any_scheduler_that_names_none() -> None:
    compared = 0
    for name in filter(lambda name: name.endswith("Scheduler"), dir(diffusers)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parameter = inspect.signature(getattr(diffusers, name)).parameters.get("timestep_spacing")
        if parameter is not None:
            assert default_spacing(name) == parameter.default, name
            compared += 1
    assert compared > 15


def agree(name: str, config: dict[str, Any], steps: int, timesteps: tuple[int, ...] = ()) -> None:
    """Either both refuse, or both have the same."""
    theirs = getattr(diffusers, name).from_config({"_class_name": name, **config})
    try:
        theirs.set_timesteps(**({"timesteps": list(timesteps)} if timesteps else {"num_inference_steps": steps}))
    except ValueError:
        with pytest.raises(ValueError):
            noise_schedule(name, config, steps, timesteps)
        return
    ours = noise_schedule(name, config, steps, timesteps)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, **exactly)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, **exactly)
    assert ours.initial_sigma == pytest.approx(float(theirs.init_noise_sigma), nan_ok=True, rel=0, abs=0)
    if ours.sigmas is None:
        torch.testing.assert_close(ours.final_alpha_cumprod, theirs.final_alpha_cumprod, **exactly)
    else:
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, **exactly)


BETAS = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([1000, 100]),
        "beta_start": st.sampled_from([0.00085, 0.0001]),
        "beta_schedule": st.sampled_from(["scaled_linear", "linear", "squaredcos_cap_v2"]),
        "rescale_betas_zero_snr": st.booleans(),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.integers(0, 1),
    }
)
SIGMAS = st.fixed_dictionaries(
    {
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "interpolation_type": st.sampled_from(["linear", "linear", "log_linear"]),
        "timestep_type": st.sampled_from(["discrete", "discrete", "continuous"]),
        "use_karras_sigmas": st.sampled_from([False, False, True]),
        "use_exponential_sigmas": st.sampled_from([False, False, True]),
        "use_lu_lambdas": st.sampled_from([False, False, True]),
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.just(False),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SOLVERS), BETAS, SIGMAS, st.integers(1, 60))
def test_solvers(name: str, betas: dict[str, Any], sigmas: dict[str, Any], steps: int) -> None:
    if sigmas["use_karras_sigmas"] and sigmas["use_exponential_sigmas"]:
        return  # diffusers refuses these where the scheduler is made
    agree(name, {key: value for key, value in (betas | sigmas).items() if key in DEFAULTS[name]}, steps)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["LCMScheduler", "TCDScheduler"]), BETAS, st.sampled_from([50, 100, 7]), st.integers(1, 60))
def test_schedulers_of_few_steps(name: str, betas: dict[str, Any], original: int, steps: int) -> None:
    agree(name, betas | {"original_inference_steps": original}, steps)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
@pytest.mark.parametrize("karras", [False, True])
def test_time_steps_that_are_given(name: str, karras: bool) -> None:
    config = {"use_karras_sigmas": karras} if "use_karras_sigmas" in DEFAULTS[name] else {}
    agree(name, config, 4, (999, 749, 499, 249))


def test_betas_that_are_given() -> None:
    agree("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4}, 2)


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": True},
        {"beta_start": "small"},
        {"beta_schedule": ["linear"]},
        {"trained_betas": "none"},
        {"trained_betas": [0.1]},
        {"timestep_spacing": 3},
        {"steps_offset": "one", "timestep_spacing": "leading"},
        {"interpolation_type": None},
        {"final_sigmas_type": 0},
        {"use_karras_sigmas": True, "sigma_min": "low"},
        {"use_beta_sigmas": True},
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused_in_one_line(config: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        table_from_scheduler({"_class_name": "EulerDiscreteScheduler", **config}, 5)
    assert "\n" not in str(caught.value) and "EulerDiscreteScheduler" in str(caught.value)
