"""Every sampler as one table: per UNet call, the coefficients of a linear update.

With x the latents, e the guided UNet output and x0 the clean latents that they predict, each supported sampler does

    UNet input = row.input_scale · x
    x0         = row.x0_from_x · x + row.x0_from_output · e
    next x     = row.x · x + row.output · e + row.previous_x0 · (x0 of the call before) + row.noise · (fresh noise)

so one loop (or one CUDA graph, which reads its row by a step counter) serves them all, and no scheduler object with
its state and its host synchronisation is needed while frames are drawn.

Sources: DDIM (arXiv 2010.02502), Euler and Karras steps (arXiv 2206.00364), DPM-Solver++ 2M (arXiv 2211.01095),
latent consistency models (arXiv 2310.04378). Time steps and noise levels are those of diffusers' own schedulers.
"""

import inspect
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from torch import Tensor

from storyadapter.method.constants import DDIM_CONFIG, PREDICTION_TYPES, SAMPLERS
from storyadapter.method.errors import Field, InputError
from storyadapter.method.plan import SamplerSettings

_KARRAS_SAMPLERS = ("euler", "dpmpp_2m")
_CLASSES: Mapping[str, type[SchedulerMixin]] = {
    cls.__name__: cls for cls in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler)
}


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """Coefficients of one sampler, one row per UNet call.

    K, the number of calls, is the number of steps asked for, except with a scheduler configuration of trailing time
    steps that don't divide its training steps. Every tensor is [K] fp32 on the CPU, rounded once from fp64.
    """

    timestep: Tensor  # what the UNet is told; not always whole
    input_scale: Tensor  # factor of x in the UNet's input
    x: Tensor  # factor of x in the next x
    output: Tensor  # factor of the guided UNet output in the next x
    previous_x0: Tensor  # factor of the x0 predicted by the call before; 0 in the first row
    noise: Tensor  # factor of this step's fresh noise; 0 where none is drawn
    x0_from_x: Tensor  # factor of x in the predicted x0
    x0_from_output: Tensor  # factor of the guided UNet output in the predicted x0
    initial_sigma: float  # standard deviation of the first x; factor of the initial noise

    @property
    def calls(self) -> int:
        """K, the number of UNet calls."""
        return len(self.timestep)

    @property
    def is_multistep(self) -> bool:
        """Whether any step reads the x0 predicted by the call before."""
        return bool(self.previous_x0.any())

    @property
    def noisy_calls(self) -> list[int]:
        """The calls, ascending, after which fresh noise is added."""
        return self.noise.nonzero().flatten().tolist()

    def initial_latents(self, noise: Tensor) -> Tensor:
        """The x of the first call: raw noise of any shape times `initial_sigma`, in fp32."""
        return noise.float() * self.initial_sigma

    def coefficients(self, device: torch.device | str = "cpu") -> Tensor:
        """All columns as one tensor for `scale_input` and `step`: [K, 8] fp32, columns in the order of `COLUMNS`."""
        return torch.stack([getattr(self, name) for name in COLUMNS], dim=1).to(device)


COLUMNS = tuple(field.name for field in fields(SamplerTable) if field.name != "initial_sigma")


def timestep_at(coefficients: Tensor, step_index: Tensor) -> Tensor:
    """The time step of one UNet call, [1] fp32; arguments as those of `step`."""
    return _row(coefficients, step_index)["timestep"]


def scale_input(coefficients: Tensor, step_index: Tensor, x: Tensor) -> Tensor:
    """The UNet's latents of one call, [F, 4, h, w] in x's dtype; arguments as those of `step`."""
    return _row(coefficients, step_index)["input_scale"].to(x.dtype) * x


def step(
    coefficients: Tensor,
    step_index: Tensor,
    x: Tensor,
    output: Tensor,
    previous_x0: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of any sampler, without a host synchronisation. The state (x, x0) stays in x's dtype: fp32.

    Args:
        coefficients: [K, 8] fp32, from `SamplerTable.coefficients`.
        step_index: [1] int64 on the same device: the step counter.
        x: [F, 4, h, w] fp32.
        output: [F, 4, h, w], any floating dtype: the UNet's output after guidance.
        previous_x0: [F, 4, h, w] fp32, the x0 that the call before returned, zeros at the first one. Required when
            the table `is_multistep`, may be left out otherwise.
        noise: this step's fresh noise, broadcast against x. Required when the table has `noisy_calls`, may be left
            out otherwise; what stands there in the other calls must be finite.

    Returns:
        The next x and the predicted x0, each [F, 4, h, w] in x's dtype.
    """
    row = {name: value.to(x.dtype) for name, value in _row(coefficients, step_index).items()}
    output = output.to(x.dtype)
    x_next = row["x"] * x + row["output"] * output
    if previous_x0 is not None:
        x_next = x_next + row["previous_x0"] * previous_x0
    if noise is not None:
        x_next = x_next + row["noise"] * noise
    return x_next, row["x0_from_x"] * x + row["x0_from_output"] * output


def build_sampler(
    name: str, steps: int, karras: bool = False, prediction_type: str = "epsilon", zero_terminal_snr: bool = False
) -> SamplerTable:
    """The table of a sampler by name, with the noise schedule of SDXL and of the published method.

    `ddim` is the published one, with the published constants; the others share its noise schedule and, like SDXL's own
    schedulers, its leading time steps and its offset of 1. The settings are those of a plan: with `zero_terminal_snr`
    betas are rescaled so that the first step starts from pure noise, and time steps trail (arXiv 2305.08891).

    Raises:
        InputError: an unknown name, a combination that doesn't exist, or a number of steps that can't be had.
    """
    if name not in SAMPLERS:
        raise InputError(f"no scheduler is called {name!r}", expected=f"one of {', '.join(SAMPLERS)}")
    if karras and name not in _KARRAS_SAMPLERS:
        raise InputError(
            f"Karras steps are not defined for {name}", expected=f"one of {', '.join(_KARRAS_SAMPLERS)} with them"
        )
    scheduler = _CLASSES[SAMPLERS[name]]
    settings = {**DDIM_CONFIG, "prediction_type": prediction_type, "use_karras_sigmas": karras}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    known = inspect.signature(scheduler).parameters
    config = {key: value for key, value in settings.items() if key in known}
    return table_from_scheduler({**config, "_class_name": scheduler.__name__}, steps)


@lru_cache(maxsize=16)
def sampler_of(settings: SamplerSettings) -> SamplerTable:
    """The sampler that a plan asks for. Raises: InputError, as `build_sampler`."""
    return build_sampler(*astuple(settings))


def table_from_scheduler(scheduler: SchedulerMixin | Mapping[str, Any], steps: int) -> SamplerTable:
    """The table of a diffusers scheduler, such as a checkpoint's own.

    Args:
        scheduler: a scheduler (left as it is) or its configuration as in `scheduler_config.json`, with `_class_name`.
        steps: number of denoising steps, 1 or more.

    Raises:
        InputError: another class than DDIM, Euler (discrete), DPM-Solver++ (orders 1 and 2) or LCM; a setting that
            makes the update non-linear (thresholding, sample clipping) or that isn't covered; or a number of steps
            that the scheduler can't do.
    """
    config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
    # A scheduler object knows its class; its configuration may still carry the one it was converted from.
    name = str(config.get("_class_name")) if isinstance(scheduler, Mapping) else type(scheduler).__name__
    if name not in _CLASSES:
        raise InputError(f"scheduler {name} is not supported", expected=f"one of {', '.join(_CLASSES)}")
    most = config.get("num_train_timesteps", 1000)  # unless told, diffusers' own; Euler would do more at one time step
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise InputError(f"{steps} denoising steps", expected=f"a whole number from 1 to {most}")
    _refuse_unsupported(name, config)
    try:
        fresh = _CLASSES[name].from_config(config)
        fresh.set_timesteps(steps)
        rows = _lcm_rows(fresh) if name == "LCMScheduler" else _solver_rows(fresh)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{name} can't do {steps} steps ({error}); try another number of steps") from error
    table = SamplerTable(
        timestep=fresh.timesteps.float(),
        **{column: values.float() for column, values in rows.items()},
        initial_sigma=float(fresh.init_noise_sigma),
    )
    if not table.coefficients().isfinite().all():
        if fresh.config.get("rescale_betas_zero_snr") and fresh.config.prediction_type == "epsilon":
            raise InputError(
                f"{name} can't start from pure noise (",
                Field("zero_terminal_snr"),
                ") with epsilon prediction, which divides by the signal",
                expected=(Field("prediction_type"), " v_prediction or sample"),
            )
        raise InputError(
            f"{name} with {steps} steps and {fresh.config.prediction_type} prediction divides by zero: two steps share "
            "one noise level, or the first has no signal; try fewer steps"
        )
    return table


def _refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    """Names the first setting of a scheduler configuration that a linear two-step table can't express."""
    if config.get("thresholding"):
        raise InputError(f"{name} with thresholding=True is not linear", expected="thresholding=False")
    # DDIM clips unless told not to; the others have no such setting or leave it off.
    if config.get("clip_sample", name == "DDIMScheduler"):
        raise InputError(f"{name} with clip_sample=True is not linear", expected="clip_sample=False")
    if (prediction := config.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise InputError(
            f"{name} with prediction_type={prediction!r}", expected=f"one of {', '.join(PREDICTION_TYPES)}"
        )
    if name != "DPMSolverMultistepScheduler":
        return
    expected = {
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "solver_order": (2, (1, 2)),
        "solver_type": ("midpoint", ("midpoint",)),
        "use_flow_sigmas": (False, (False,)),
        "variance_type": (None, (None,)),
    }
    for key, (default, supported) in expected.items():
        if (value := config.get(key, default)) not in supported:
            wanted = " or ".join(repr(choice) for choice in supported)
            raise InputError(f"{name} with {key}={value!r} is not supported", expected=f"{wanted}")


def _solver_rows(scheduler: SchedulerMixin) -> dict[str, Tensor]:
    """DDIM, Euler and DPM-Solver++: x_next = σ'/σ · x + (α' − α·σ'/σ) · D, with D the x0 extrapolated from two calls.

    They differ in the noise levels, in the scale in which x is kept (Euler's α is always 1), and in D, which is the
    predicted x0 itself except in the second-order steps of DPM-Solver++.
    """
    alpha, sigma, next_alpha, next_sigma = _noise_levels(scheduler)
    if not isinstance(scheduler, EulerDiscreteScheduler):  # it keeps the variance
        input_scale, signal, spread = torch.ones_like(alpha), alpha, sigma
    else:
        input_scale = (sigma**2 + 1).rsqrt()
        signal, spread = input_scale, sigma * input_scale
    x0_from_x, x0_from_output = _x0_from(scheduler.config.prediction_type, signal, spread)
    x0_from_x = x0_from_x * input_scale  # the UNet predicts from the scaled x

    from_x = next_sigma / sigma
    from_x0 = next_alpha - alpha * from_x
    extrapolation = _extrapolation(scheduler, alpha, sigma, next_alpha, next_sigma)
    now, before = from_x0 * (1 + extrapolation), -from_x0 * extrapolation
    return {
        "input_scale": input_scale,
        "x": from_x + now * x0_from_x,
        "output": now * x0_from_output,
        "previous_x0": before,
        "noise": torch.zeros_like(from_x),
        "x0_from_x": x0_from_x,
        "x0_from_output": x0_from_output,
    }


def _noise_levels(scheduler: SchedulerMixin) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """α and σ of x before and after each step, each [K] fp64."""
    if isinstance(scheduler, DDIMScheduler):
        cumulative = scheduler.alphas_cumprod.double()
        now = scheduler.timesteps
        following = now - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        # A negative index would wrap around, so it is clamped and its value replaced.
        squared_next = torch.where(
            following >= 0, cumulative[following.clamp(min=0)], scheduler.final_alpha_cumprod.double()
        )
        squared = cumulative[now]
        return squared.sqrt(), (1 - squared).sqrt(), squared_next.sqrt(), (1 - squared_next).sqrt()
    sigmas = scheduler.sigmas.double()
    alphas = torch.ones_like(sigmas)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        alphas = (sigmas**2 + 1).rsqrt()
        sigmas = sigmas * alphas
    return alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:]


def _extrapolation(
    scheduler: SchedulerMixin, alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor
) -> Tensor:
    """h / (2·h_before) of the second-order steps of DPM-Solver++, with h the step in log(α/σ); 0 elsewhere. [K] fp64"""
    calls = len(alpha)
    factor = torch.zeros_like(alpha)
    if not isinstance(scheduler, DPMSolverMultistepScheduler) or scheduler.config.solver_order == 1:
        return factor
    config = scheduler.config
    last_is_first_order = (
        config.euler_at_final
        or (config.lower_order_final and calls < 15)
        or config.final_sigmas_type == "zero"  # there log(α/σ) is infinite
    )
    second_order = slice(1, calls - 1 if last_is_first_order else calls)
    step_size = (next_alpha / next_sigma).log() - (alpha / sigma).log()
    factor[second_order] = 0.5 * step_size[second_order] / step_size[:-1][: len(factor[second_order])]
    return factor


def _lcm_rows(scheduler: LCMScheduler) -> dict[str, Tensor]:
    """LCM: x0 made consistent at the boundary, then noised again to the next level, except after the last call."""
    squared = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    x0_from_x, x0_from_output = _x0_from(scheduler.config.prediction_type, alpha, sigma)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(scheduler.timesteps.double())
    one, zero = alpha.new_ones(1), alpha.new_zeros(1)
    next_alpha, next_sigma = torch.cat([alpha[1:], one]), torch.cat([sigma[1:], zero])
    return {
        "input_scale": torch.ones_like(alpha),
        "x": next_alpha * (skip + out * x0_from_x),
        "output": next_alpha * out * x0_from_output,
        "previous_x0": torch.zeros_like(alpha),
        "noise": next_sigma,
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


def _row(coefficients: Tensor, step_index: Tensor) -> dict[str, Tensor]:
    """Each column's value at the step counter, [1] fp32."""
    return dict(zip(COLUMNS, coefficients.index_select(0, step_index).unbind(dim=1), strict=True))
