"""The linear coefficients of each sampler's steps, in fp64, from a noise schedule.

Beside the columns of a `SamplerTable`, `alpha` and `sigma` say what x is before each step: alpha · x0 + sigma · noise.
"""

from typing import Final

import torch
from torch import Tensor

from storyadapter.method.noise_schedule import NoiseSchedule

_DATA_SPREAD: Final = 0.5  # of the data, as the boundary condition of LCM has it


def solver_rows(scheduler: NoiseSchedule, skipped: int = 0, explicit: bool = False) -> dict[str, Tensor]:
    """DDIM, Euler and DPM-Solver++: x_next = σ'/σ · x + (α' − α·σ'/σ) · D, with D the x0 extrapolated from two calls.

    They differ in the noise levels, in the scale in which x is kept (Euler's α is always 1), in D, which is the
    predicted x0 itself except in the second-order steps of DPM-Solver++, and in σ', which with ancestral steps is
    smaller than the next noise level: fresh noise makes up for the difference. The first step that isn't skipped has
    no call before it.
    """
    alpha, sigma, next_alpha, next_sigma = _noise_levels(scheduler, explicit)
    fresh = torch.zeros_like(sigma)
    if scheduler.name == "EulerAncestralDiscreteScheduler":
        fresh = next_sigma * (1 - (next_sigma / sigma) ** 2).sqrt()
        next_sigma = next_sigma**2 / sigma
    if not scheduler.name.startswith("Euler"):  # it keeps the variance
        input_scale, signal, spread = torch.ones_like(alpha), alpha, sigma
    else:
        input_scale = (sigma**2 + 1).rsqrt()
        signal, spread = input_scale, sigma * input_scale
    x0_from_x, x0_from_output = _x0_from(scheduler.config["prediction_type"], signal, spread)
    x0_from_x = x0_from_x * input_scale  # the UNet predicts from the scaled x

    from_x = next_sigma / sigma
    from_x0 = next_alpha - alpha * from_x
    extrapolation = _extrapolation(scheduler, skipped, alpha, sigma, next_alpha, next_sigma)
    now, before = from_x0 * (1 + extrapolation), -from_x0 * extrapolation
    return {
        "alpha": alpha,
        "sigma": sigma,
        "input_scale": input_scale,
        "x": from_x + now * x0_from_x,
        "output": now * x0_from_output,
        "previous_x0": before,
        "noise": fresh,
        "x0_from_x": x0_from_x,
        "x0_from_output": x0_from_output,
    }


def _noise_levels(scheduler: NoiseSchedule, explicit: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """α and σ of x before and after each step, each [K] fp64.

    `explicit`: DDIM steps from each time step to the next, not by a K-th of the training steps.
    """
    if scheduler.name == "DDIMScheduler":
        cumulative = scheduler.alphas_cumprod.double()
        now = scheduler.timesteps
        following = now - scheduler.config["num_train_timesteps"] // scheduler.steps
        if explicit:
            following = torch.cat([now[1:], now.new_full((1,), -1)])
        # A negative index would wrap around, so it is clamped and its value replaced.
        squared_next = torch.where(
            following >= 0, cumulative[following.clamp(min=0)], scheduler.final_alpha_cumprod.double()
        )
        squared = cumulative[now]
        return squared.sqrt(), (1 - squared).sqrt(), squared_next.sqrt(), (1 - squared_next).sqrt()
    assert scheduler.sigmas is not None
    sigmas = scheduler.sigmas.double()
    alphas = torch.ones_like(sigmas)
    if scheduler.name == "DPMSolverMultistepScheduler":
        alphas = (sigmas**2 + 1).rsqrt()
        sigmas = sigmas * alphas
    return alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:]


def _extrapolation(
    scheduler: NoiseSchedule, skipped: int, alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor
) -> Tensor:
    """h / (2·h_before) of the second-order steps of DPM-Solver++, with h the step in log(α/σ); 0 elsewhere. [K] fp64"""
    calls = len(alpha)
    factor = torch.zeros_like(alpha)
    if scheduler.name != "DPMSolverMultistepScheduler" or scheduler.config["solver_order"] == 1:
        return factor
    config = scheduler.config
    last_is_first_order = (
        config["euler_at_final"]
        or (config["lower_order_final"] and calls < 15)
        or config["final_sigmas_type"] == "zero"  # there log(α/σ) is infinite
    )
    second_order = slice(skipped + 1, calls - 1 if last_is_first_order else calls)
    step_size = (next_alpha / next_sigma).log() - (alpha / sigma).log()
    factor[second_order] = 0.5 * step_size[second_order] / step_size[skipped:][: len(factor[second_order])]
    return factor


def lcm_rows(scheduler: NoiseSchedule) -> dict[str, Tensor]:
    """LCM: x0 made consistent at the boundary, then noised again to the next level, except after the last call."""
    squared = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    x0_from_x, x0_from_output = _x0_from(scheduler.config["prediction_type"], alpha, sigma)
    scaled = scheduler.timesteps.double() * scheduler.config["timestep_scaling"]
    skip, out = _DATA_SPREAD**2 / (scaled**2 + _DATA_SPREAD**2), scaled / (scaled**2 + _DATA_SPREAD**2).sqrt()
    one, zero = alpha.new_ones(1), alpha.new_zeros(1)
    next_alpha, next_sigma = torch.cat([alpha[1:], one]), torch.cat([sigma[1:], zero])
    return {
        "alpha": alpha,
        "sigma": sigma,
        "input_scale": torch.ones_like(alpha),
        "x": next_alpha * (skip + out * x0_from_x),
        "output": next_alpha * out * x0_from_output,
        "previous_x0": torch.zeros_like(alpha),
        "noise": next_sigma,
        "x0_from_x": x0_from_x,
        "x0_from_output": x0_from_output,
    }


def tcd_rows(scheduler: NoiseSchedule, eta: float) -> dict[str, Tensor]:
    """Trajectory consistency: x0 carried to time s = (1 − η)·t', then noised from there to the next time t'; after the
    last call t' is the first time step of training, and no noise is added. η 0 adds none at all, 1 is a step as LCM's.
    """
    cumulative, now = scheduler.alphas_cumprod.double(), scheduler.timesteps
    following = torch.cat([now[1:], now.new_zeros(1)])
    intermediate = torch.floor((1 - eta) * following).long()  # in fp32, as diffusers rounds it
    alpha, next_alpha, mid_alpha = (cumulative[at].sqrt() for at in (now, following, intermediate))
    sigma, mid_sigma = ((1 - cumulative[at]).sqrt() for at in (now, intermediate))
    x0_from_x, x0_from_output = _x0_from(scheduler.config["prediction_type"], alpha, sigma)
    kept = next_alpha / mid_alpha  # of what lies at s
    kept[-1] = 1
    fresh = (1 - kept**2).clamp(min=0).sqrt()
    from_x = kept * mid_sigma / sigma
    from_x0 = kept * mid_alpha - from_x * alpha
    return {
        "alpha": alpha,
        "sigma": sigma,
        "input_scale": torch.ones_like(alpha),
        "x": from_x + from_x0 * x0_from_x,
        "output": from_x0 * x0_from_output,
        "previous_x0": torch.zeros_like(alpha),
        "noise": fresh,
        "x0_from_x": x0_from_x,
        "x0_from_output": x0_from_output,
    }


def _x0_from(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x = α·x0 + σ·ε (at unit variance) and of the UNet's output in the x0 that they predict."""
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":
            return alpha, -sigma
        case _:
            return torch.zeros_like(alpha), torch.ones_like(alpha)
