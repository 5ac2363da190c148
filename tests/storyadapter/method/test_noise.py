"""Noise is that which diffusers would draw, whatever the sampler."""

import pytest
import torch
from diffusers import LCMScheduler

from storyadapter.method.noise import draw_noise
from storyadapter.method.sampler import build_sampler, scale_input, step, timestep_at


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_a_sampler_without_noise_in_its_steps_draws_only_the_initial_one(name: str) -> None:
    noise = draw_noise(5, 6, 8, build_sampler(name, 10))
    assert noise.per_step.shape == (0, 1, 4, 6, 8)
    expected = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(noise.initial, expected, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_draws_in_the_order_of_diffusers(steps: int) -> None:
    """One generator for the initial latents and for diffusers' own LCM steps, against everything drawn up front."""
    scheduler = LCMScheduler(steps_offset=1)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(11)
    expected = torch.randn(1, 4, 6, 8, generator=generator)
    for timestep in scheduler.timesteps:
        expected = scheduler.step(expected.tanh(), timestep, expected, generator=generator).prev_sample

    table = build_sampler("lcm", steps)
    noise = draw_noise(11, 6, 8, table)
    assert len(noise.per_step) == (steps if steps > 1 else 0)
    coefficients = table.coefficients()
    x = table.initial_latents(noise.initial)
    for call in range(table.calls):
        at = torch.tensor([call])
        fresh = noise.per_step.index_select(0, at)[0] if len(noise.per_step) else None
        assert float(timestep_at(coefficients, at)) == float(scheduler.timesteps[call])
        x, _ = step(coefficients, at, x, scale_input(coefficients, at, x).tanh(), noise=fresh)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_seed_is_the_same_noise_again_and_another_seed_is_not() -> None:
    table = build_sampler("lcm", 3)
    first, again, other = (draw_noise(seed, 4, 4, table) for seed in (1, 1, 2))
    assert torch.equal(first.initial, again.initial)
    assert torch.equal(first.per_step, again.per_step)
    assert not torch.equal(first.initial, other.initial)
    assert not torch.equal(first.per_step, other.per_step)
    assert first.initial.dtype == first.per_step.dtype == torch.float32
