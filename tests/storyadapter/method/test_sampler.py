"""The table against diffusers' own schedulers, step by step and over whole trajectories."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storyadapter.method.constants import MAX_STEPS, SAMPLERS
from storyadapter.method.errors import InputError
from storyadapter.method.sampler import (
    COLUMNS,
    SamplerTable,
    build_sampler,
    scale_input,
    step,
    table_from_scheduler,
    timestep_at,
)

SHAPE = (2, 4, 6, 5)
NOISE_SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING = dict(steps_offset=1, timestep_spacing="leading")
KINDS = [
    *(("ddim", False), ("euler", False), ("euler", True), ("euler_a", False), ("dpmpp_2m", False), ("dpmpp_2m", True)),
    *(("lcm", False), ("tcd", False)),
]
CHOOSING = ("lcm", "tcd")  # these choose their time steps themselves


def diffusers_scheduler(name: str, karras: bool = False, prediction: str = "epsilon", zero_snr: bool = False):
    """The scheduler as a diffusers user would set it up for SDXL, written out apart from the code under test."""
    common = NOISE_SCHEDULE | LEADING | dict(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    if zero_snr:
        common |= dict(timestep_spacing="trailing")
    match name:
        case "ddim":
            return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False)
        case "euler":
            return EulerDiscreteScheduler(**common, use_karras_sigmas=karras)
        case "dpmpp_2m":
            return DPMSolverMultistepScheduler(**common, use_karras_sigmas=karras)
        case "euler_a":
            return EulerAncestralDiscreteScheduler(**common)
        case "lcm":
            return LCMScheduler(**common, set_alpha_to_one=False)
        case "tcd":
            return TCDScheduler(**common, set_alpha_to_one=False)
    raise AssertionError(name)


def config_of(scheduler) -> dict[str, Any]:
    """As it is saved; an object knows its class, its configuration may carry the one that it was converted from."""
    return scheduler if isinstance(scheduler, dict) else {**scheduler.config, "_class_name": type(scheduler).__name__}


def stand_in_unet(latents: Tensor, timestep: float) -> Tensor:
    """Any deterministic, bounded, non-linear function of what the UNet is given."""
    return torch.tanh(latents.roll(1, -1) - 0.5 * latents.flip(-2)) + math.sin(timestep)


def assert_steps_agree(
    scheduler, table: SamplerTable, steps: int, tolerance: float = 2e-6, timesteps=None, **extra
) -> None:
    """Feeds both the same state in every step and compares what they make of it, relative to the terms summed."""
    generator = torch.Generator().manual_seed(steps)
    scheduler.set_timesteps(**{"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps})
    if not isinstance(scheduler, DDIMScheduler):
        scheduler.set_begin_index(0)  # as the pipelines do; otherwise it takes the second of two equal first time steps
    assert table.calls == len(scheduler.timesteps)
    torch.testing.assert_close(table.timestep, scheduler.timesteps.float(), rtol=0, atol=0)
    initial = torch.randn(SHAPE, generator=generator)
    x = initial * scheduler.init_noise_sigma
    torch.testing.assert_close(table.initial_latents(initial), x, rtol=1e-7, atol=0)
    coefficients = table.coefficients()
    previous_x0 = torch.zeros(SHAPE)
    for index, timestep in enumerate(scheduler.timesteps):
        at = torch.tensor([index])
        assert float(timestep_at(coefficients, at)) == float(timestep)
        expected_input = scheduler.scale_model_input(x, timestep)
        torch.testing.assert_close(scale_input(coefficients, at, x), expected_input, rtol=1e-6, atol=0)
        output = stand_in_unet(expected_input, float(timestep))
        noise_seed = 1000 + index
        kwargs = {} if isinstance(scheduler, DDIMScheduler) else {"generator": torch.manual_seed(noise_seed)}
        result = scheduler.step(output, timestep, x, **kwargs, **extra)
        noise = torch.randn(SHAPE, generator=torch.manual_seed(noise_seed))
        x_next, x0 = step(coefficients, at, x, output, previous_x0, noise)
        row = dict(zip(COLUMNS, coefficients[index].tolist(), strict=True))
        scale = (
            abs(row["x0_from_x"]) * x.abs().max()
            + abs(row["x0_from_output"]) * output.abs().max()
            + x.abs().max()
            + abs(row["previous_x0"]) * previous_x0.abs().max()
        )
        assert (x_next - result.prev_sample).abs().max() <= tolerance * scale, f"step {index} of {steps}"
        if (expected_x0 := getattr(result, "pred_original_sample", None)) is not None:
            assert (x0 - expected_x0).abs().max() <= tolerance * scale, f"x0 of step {index} of {steps}"
        x, previous_x0 = result.prev_sample, x0


@pytest.mark.parametrize("steps", [1, 2, 4, 14, 15, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "karras"), KINDS)
def test_every_step_is_that_of_diffusers(name: str, karras: bool, prediction: str, steps: int) -> None:
    if (name, prediction) == ("euler_a", "sample"):
        pytest.skip("diffusers doesn't have it")
    scheduler = diffusers_scheduler(name, karras, prediction)
    assert_steps_agree(scheduler, build_sampler(name, steps, karras, prediction), steps)


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
@pytest.mark.parametrize(("name", "karras"), KINDS)
def test_v_prediction_from_zero_signal(name: str, karras: bool, steps: int) -> None:
    scheduler = diffusers_scheduler(name, karras, "v_prediction", zero_snr=True)
    assert_steps_agree(scheduler, build_sampler(name, steps, karras, "v_prediction", zero_terminal_snr=True), steps)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind[0] not in CHOOSING]),
    steps=st.integers(1, 120),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    final=st.sampled_from(["zero", "sigma_min"]),
)
def test_any_spacing_and_number_of_steps(kind, steps: int, prediction: str, spacing: str, final: str) -> None:
    name, karras = kind
    scheduler = type(diffusers_scheduler(name)).from_config(
        diffusers_scheduler(name, karras, prediction).config,
        timestep_spacing=spacing,
        **({} if name in ("ddim", "euler_a") else {"final_sigmas_type": final}),
    )
    assert_steps_agree(scheduler, table_from_scheduler(config_of(scheduler), steps), steps)


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 50), prediction=st.sampled_from(["epsilon", "v_prediction"]))
def test_lcm_with_any_number_of_steps(steps: int, prediction: str) -> None:
    scheduler = diffusers_scheduler("lcm", prediction=prediction)
    assert_steps_agree(scheduler, build_sampler("lcm", steps, prediction_type=prediction), steps)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.integers(1, 50),
    eta=st.sampled_from([0.0, 0.3, 0.55, 1.0]),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
)
def test_tcd_with_any_share_of_noise(steps: int, eta: float, prediction: str) -> None:
    scheduler = diffusers_scheduler("tcd", prediction=prediction)
    table = build_sampler("tcd", steps, prediction_type=prediction, eta=eta)
    assert_steps_agree(scheduler, table, steps, eta=eta)
    assert table.noisy_calls == ([*range(steps - 1)] if eta else [])


@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (999,), (980, 3, 0)])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "lcm", "tcd"])
def test_time_steps_that_are_given(name: str, timesteps: tuple[int, ...]) -> None:
    table = build_sampler(name, len(timesteps), timesteps=timesteps)
    assert_steps_agree(diffusers_scheduler(name), table, len(timesteps), timesteps=list(timesteps))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_time_steps_of_ddim_that_are_given(steps: int) -> None:
    """diffusers' DDIM takes none, but the same ones must be the same table."""
    chosen = build_sampler("ddim", steps, timestep_spacing="trailing")
    given = build_sampler("ddim", steps, timesteps=tuple(int(t) for t in chosen.timestep))
    torch.testing.assert_close(given.coefficients(), chosen.coefficients(), rtol=0, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmpp_2m"])
def test_spacing_of_few_steps(name: str, spacing: str) -> None:
    scheduler = type(diffusers_scheduler(name)).from_config(diffusers_scheduler(name).config, timestep_spacing=spacing)
    for steps in (1, 2, 4, 8):
        table = build_sampler(name, steps, timestep_spacing=spacing)
        assert_steps_agree(scheduler, table, steps)
        assert spacing != "trailing" or table.timestep[0] == 999


@pytest.mark.parametrize(
    "own",
    [
        EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing"),
        EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(**NOISE_SCHEDULE, use_karras_sigmas=True, euler_at_final=True),
        TCDScheduler(**NOISE_SCHEDULE),
        DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_the_scheduler_that_a_model_comes_with(own, tmp_path) -> None:
    own.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    prediction = "v_prediction" if isinstance(own, DDIMScheduler) else "epsilon"
    starts_from_noise = isinstance(own, DDIMScheduler)
    table = build_sampler(
        "checkpoint", 6, prediction_type=prediction, zero_terminal_snr=starts_from_noise, configuration=text
    )
    own.register_to_config(prediction_type=prediction)
    assert_steps_agree(own, table, 6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(lower_order_final=False),
        dict(euler_at_final=True, final_sigmas_type="sigma_min"),
        dict(solver_order=1),
        dict(use_exponential_sigmas=True),
        dict(use_lu_lambdas=True),
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("steps", [5, 20])
def test_settings_of_dpm_solver(changes: dict, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, **LEADING, **changes)
    assert_steps_agree(scheduler, table_from_scheduler(config_of(scheduler), steps), steps)


@pytest.mark.parametrize(("name", "karras"), KINDS)
def test_whole_trajectory(name: str, karras: bool) -> None:
    """Errors don't build up over the steps, and the noise is drawn where diffusers draws it."""
    steps = 30
    scheduler = diffusers_scheduler(name, karras)
    scheduler.set_timesteps(steps)
    table = build_sampler(name, steps, karras)
    start = torch.randn(SHAPE, generator=torch.manual_seed(7))

    expected = start * scheduler.init_noise_sigma
    generator = torch.manual_seed(8)
    kwargs = {} if name == "ddim" else {"generator": generator}
    for timestep in scheduler.timesteps:
        output = stand_in_unet(scheduler.scale_model_input(expected, timestep), float(timestep))
        expected = scheduler.step(output, timestep, expected, **kwargs).prev_sample

    generator = torch.manual_seed(8)
    noise = torch.zeros(steps, *SHAPE)
    for index in table.noisy_calls:
        noise[index] = torch.randn(SHAPE, generator=generator)
    coefficients, counter = table.coefficients(), torch.zeros(1, dtype=torch.int64)
    x, x0 = table.initial_latents(start), torch.zeros(SHAPE)
    for _ in range(table.calls):
        output = stand_in_unet(scale_input(coefficients, counter, x), float(timestep_at(coefficients, counter)))
        x, x0 = step(coefficients, counter, x, output, x0, noise.index_select(0, counter)[0])
        counter += 1
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.6), (4, 0.3), (20, 0.99)])
@pytest.mark.parametrize(("name", "karras"), KINDS)
def test_the_last_steps_from_noised_latents(name: str, karras: bool, steps: int, strength: float) -> None:
    """As in diffusers' image-to-image pipelines."""
    scheduler = diffusers_scheduler(name, karras)
    scheduler.set_timesteps(steps)
    first = steps - int(steps * strength)
    if name != "ddim":
        scheduler.set_begin_index(first)
    table = build_sampler(name, steps, karras, strength=strength)
    latents, noise = torch.randn(2, *SHAPE, generator=torch.manual_seed(5)).unbind()
    expected = scheduler.add_noise(latents, noise, scheduler.timesteps[first : first + 1])
    x, x0 = table.initial_latents(noise) + table.initial_signal * latents, torch.zeros(SHAPE)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert (table.skipped, table.calls) == (first, steps - first)
    assert table.timestep.tolist() == scheduler.timesteps[first:].tolist()
    coefficients = table.coefficients()
    for index, timestep in enumerate(scheduler.timesteps[first:]):
        at = torch.tensor([index])
        output = stand_in_unet(scheduler.scale_model_input(expected, timestep), float(timestep))
        kwargs = {} if name == "ddim" else {"generator": torch.manual_seed(index)}
        expected = scheduler.step(output, timestep, expected, **kwargs).prev_sample
        x, x0 = step(coefficients, at, x, output, x0, torch.randn(SHAPE, generator=torch.manual_seed(index)))
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_full_strength_changes_no_bit(name: str) -> None:
    plain, table = build_sampler(name, 4), build_sampler(name, 4, strength=1.0)
    assert torch.equal(table.coefficients(), plain.coefficients())
    assert (table.initial_sigma, table.initial_signal) == (plain.initial_sigma, 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize(("name", "karras"), KINDS)
def test_a_perfect_unet_is_followed_to_its_image(name: str, karras: bool, steps: int, prediction: str) -> None:
    """Needs no other scheduler: with a UNet that always knows the image, each predicted x0 and the end are it."""
    table = build_sampler(name, steps, karras, prediction)
    noise_to_signal = -build_sampler(name, steps, karras).x0_from_output  # σ/α of each call, by x0 = (x − σ·ε)/α
    coefficients = table.coefficients()
    image = torch.randn(SHAPE, generator=torch.manual_seed(1))
    x = table.initial_latents(torch.randn(SHAPE, generator=torch.manual_seed(2)))
    for index, ratio in enumerate(noise_to_signal.tolist()):
        at = torch.tensor([index])
        alpha = 1 / math.hypot(1, ratio)
        sigma = ratio * alpha
        epsilon = (scale_input(coefficients, at, x) - alpha * image) / sigma
        output = {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * image, "sample": image}[prediction]
        x, x0 = step(coefficients, at, x, output, previous_x0=image, noise=torch.zeros(SHAPE))
        torch.testing.assert_close(x0, image, rtol=0, atol=5e-5)
    # DDIM without `set_alpha_to_one` and TCD stop at the first noise level, σ = 0.03; the others reach the image.
    torch.testing.assert_close(x, image, rtol=0, atol=0.15 if name in ("ddim", "tcd") else 1e-3)


def test_the_published_sampler() -> None:
    """The first and last row of 50-step DDIM, worked out from the published constants in plain Python."""
    table = build_sampler("ddim", 50)
    assert table.timestep.tolist() == [float(t) for t in range(981, 0, -20)]
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * index / 999) ** 2 for index in range(1000)]
    kept = [math.prod(1 - beta for beta in betas[: index + 1]) for index in range(1000)]
    for row, now, following in [(0, 981, 961), (49, 1, 0)]:
        x = math.sqrt(kept[following] / kept[now])
        output = math.sqrt(1 - kept[following]) - x * math.sqrt(1 - kept[now])
        assert float(table.x[row]) == pytest.approx(x, rel=1e-5)
        assert float(table.output[row]) == pytest.approx(output, rel=1e-4)
    assert table.initial_sigma == 1.0
    assert not table.is_multistep
    assert table.noisy_calls == []
    assert table.input_scale.unique().tolist() == [1.0]


def test_which_samplers_need_what() -> None:
    assert build_sampler("dpmpp_2m", 10).is_multistep
    assert not build_sampler("dpmpp_2m", 1).is_multistep
    assert build_sampler("lcm", 4).noisy_calls == [0, 1, 2]
    assert build_sampler("lcm", 1).noisy_calls == []
    assert build_sampler("euler", 50).initial_sigma == pytest.approx(13.16, abs=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_reads_nothing_back_to_the_host(name: str) -> None:
    """Meta tensors hold no data, so anything that needed a value on the host would fail here."""
    coefficients = build_sampler(name, 4).coefficients("meta")
    counter = torch.zeros(1, dtype=torch.int64, device="meta")
    x = torch.empty(SHAPE, device="meta")
    assert timestep_at(coefficients, counter).shape == (1,)
    output = scale_input(coefficients, counter, x).half()
    x_next, x0 = step(coefficients, counter, x, output, x, x[:1])
    assert x_next.shape == x0.shape == SHAPE
    assert x_next.dtype == x0.dtype == torch.float32


def test_left_out_terms_are_those_with_factor_zero() -> None:
    coefficients, at = build_sampler("ddim", 4).coefficients(), torch.tensor([1])
    x, output = torch.randn(2, *SHAPE, generator=torch.manual_seed(3)).unbind()
    short = step(coefficients, at, x, output)
    full = step(coefficients, at, x, output, torch.ones(SHAPE), torch.ones(SHAPE))
    torch.testing.assert_close(short, full, rtol=0, atol=0)


def test_a_scheduler_converted_from_another_class_counts_as_its_own_class() -> None:
    converted = EulerDiscreteScheduler.from_config(DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False).config)
    assert_steps_agree(converted, table_from_scheduler(config_of(converted), 6), 6)


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (DDIMScheduler(), "clip_sample"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample"),
        (LCMScheduler(clip_sample=True), "clip_sample"),
        (DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (DPMSolverMultistepScheduler(solver_order=3), "solver_order=3"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "sde-dpmsolver"),
        (DPMSolverMultistepScheduler(solver_type="heun"), "heun"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_prediction"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (DPMSolverMultistepScheduler(variance_type="learned"), "variance_type"),
        (HeunDiscreteScheduler(), "HeunDiscreteScheduler"),
        (PNDMScheduler(), "PNDMScheduler"),
        ({}, "None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_covered_is_refused_by_name(scheduler, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        table_from_scheduler(config_of(scheduler), 5)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(name="heun", steps=5),
            "no scheduler is called 'heun'; expected one of ddim, euler, euler_a, dpmpp_2m, lcm",
        ),
        (dict(name="ddim", steps=5, karras=True), "Karras"),
        (dict(name="lcm", steps=5, karras=True), "Karras"),
        (dict(name="ddim", steps=0), "0 denoising steps"),
        (dict(name="ddim", steps=1000), "1000 steps"),
        (dict(name="ddim", steps=1001), "1001 denoising steps; expected a whole number from 1 to 1000"),
        (dict(name="lcm", steps=51), "51 steps"),
        (dict(name="dpmpp_2m", steps=1000), "share one noise level"),
        (dict(name="ddim", steps=5, zero_terminal_snr=True), "v_prediction"),
        (dict(name="euler", steps=5, prediction_type="flow"), "prediction_type='flow'"),
        (dict(name="lcm", steps=5, timestep_spacing="trailing"), "lcm takes the steps that it was trained with"),
        (dict(name="euler", steps=1, timesteps=(9,), timestep_spacing="trailing"), "every time step is given"),
        (dict(name="euler", steps=1, timesteps=(9,), karras=True), "Karras steps, which have time steps of their own"),
        (dict(name="euler_a", steps=1, timesteps=(9,)), "timesteps with ancestral steps; expected another scheduler"),
        (dict(name="lcm", steps=5, eta=0.5), "eta with lcm; expected scheduler tcd with it"),
        (dict(name="checkpoint", steps=5), "the model comes without a scheduler configuration"),
        (
            dict(name="checkpoint", steps=5, configuration='{"_class_name": "PNDMScheduler"}'),
            "scheduler PNDMScheduler is not supported",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_cannot_be_built_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_sampler(**arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_most_steps_are_told_to_the_number(name: str) -> None:
    timesteps = build_sampler(name, MAX_STEPS[name]).timestep
    assert len(timesteps) == MAX_STEPS[name] and timesteps.diff().max() < 0  # each its own
    with pytest.raises(InputError):
        build_sampler(name, MAX_STEPS[name] + 1)


@pytest.mark.parametrize("steps", [3, 600])
def test_ddim_that_ends_without_noise(steps: int) -> None:
    """600 steps lie one training step apart, so the last one ends at training step 0 and not beyond it."""
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, **LEADING, clip_sample=False, set_alpha_to_one=True)
    assert_steps_agree(scheduler, table_from_scheduler(config_of(scheduler), steps), steps)
