"""Every sampler as one table: per UNet call, the coefficients of a linear update.

With x the latents, e the guided UNet output and x0 the clean latents that they predict, each supported sampler does

    UNet input = row.input_scale · x
    x0         = row.x0_from_x · x + row.x0_from_output · e
    next x     = row.x · x + row.output · e + row.previous_x0 · (x0 of the call before) + row.noise · (fresh noise)

so one loop (or one CUDA graph, which reads its row by a step counter) serves them all, and no scheduler object with
its state and its host synchronisation is needed while frames are drawn.

Sources: DDIM (arXiv 2010.02502), Euler and Karras steps (arXiv 2206.00364), DPM-Solver++ 2M (arXiv 2211.01095),
latent consistency models (arXiv 2310.04378), trajectory consistency (arXiv 2402.19159). Time steps and noise levels are
those of diffusers' schedulers, see `noise_schedule`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from storyadapter.method import constants
from storyadapter.method.errors import Field, InputError
from storyadapter.method.noise_schedule import DEFAULTS, noise_schedule
from storyadapter.method.plan import SamplerSettings, last_calls
from storyadapter.method.sampler_rows import lcm_rows, solver_rows, tcd_rows


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
    initial_sigma: float  # factor of the initial noise in the first x
    initial_signal: float = 0.0  # factor of the latents that it starts from; 0: from noise alone
    skipped: int = 0  # steps before the first of these calls

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
        """The x of the first call where it starts from noise alone, or else what noise adds to it, in fp32."""
        return noise.float() * self.initial_sigma

    def coefficients(self, device: torch.device | str = "cpu") -> Tensor:
        """All columns as one tensor for `scale_input` and `step`: [K, 8] fp32, columns in the order of `COLUMNS`."""
        return torch.stack([getattr(self, name) for name in COLUMNS], dim=1).to(device)


COLUMNS = tuple(field.name for field in fields(SamplerTable) if field.type is Tensor)


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
    name: str,
    steps: int,
    karras: bool = False,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    timestep_spacing: str | None = None,
    timesteps: tuple[int, ...] = (),
    eta: float | None = None,
    configuration: str = "",
    strength: float = 1.0,
) -> SamplerTable:
    """The table of a sampler by name, with the noise schedule of SDXL and of the published method.

    `ddim` is the published one, with the published constants; the others share its noise schedule and, like SDXL's own
    schedulers, its leading time steps and its offset of 1. `checkpoint` is the scheduler that a model comes with. The
    settings are those of a plan: with `zero_terminal_snr` betas are rescaled so that the first step starts from pure
    noise, and unless said otherwise time steps trail (arXiv 2305.08891).

    Args:
        timesteps: of the UNet calls, descending, instead of those that follow from `steps`.
        eta: share of fresh noise in the steps of TCD.
        configuration: for `checkpoint`, its `scheduler_config.json`.
        strength: share of the steps that are run, the last ones, from latents that are noised as far.

    Raises:
        InputError: an unknown name, a combination that doesn't exist, or a number of steps that can't be had.
    """
    if name == constants.CHECKPOINT_SCHEDULER:
        if not configuration:
            found = (Field("scheduler"), f" {name}: the model comes without a scheduler configuration")
            raise InputError(*found, expected=f"one of {', '.join(constants.SAMPLERS)}")
        settings = json.loads(configuration)
        class_name, called = str(settings.get("_class_name")), f"the checkpoint's {settings.get('_class_name')}"
    elif name in constants.SAMPLERS:
        settings, class_name, called = dict(constants.DDIM_CONFIG), constants.SAMPLERS[name], name
    else:
        raise InputError(f"no scheduler is called {name!r}", expected=f"one of {', '.join(constants.SAMPLERS)}")
    known = DEFAULTS.get(class_name, settings)
    chooses = class_name in constants.TRAINED_STEPS
    if karras and "use_karras_sigmas" not in known:
        raise InputError(f"Karras steps are not defined for {called}", expected="one of euler, dpmpp_2m with them")
    if karras and timesteps:
        raise InputError(Field("timesteps"), " with Karras steps, which have time steps of their own", expected="one")
    if timestep_spacing is not None and (chooses or timesteps):
        reason = f"{called} takes the steps that it was trained with" if chooses else "every time step is given"
        raise InputError(
            Field("timestep_spacing"), f": {reason}", advice=("leave it out, or give ", Field("timesteps"))
        )
    if eta is not None and class_name != "TCDScheduler":
        raise InputError(Field("eta"), f" with {called}", expected=(Field("scheduler"), " tcd with it"))
    settings |= {"prediction_type": prediction_type}
    if karras:
        settings["use_karras_sigmas"] = True
    settings["rescale_betas_zero_snr"] = zero_terminal_snr
    if zero_terminal_snr and name != constants.CHECKPOINT_SCHEDULER:
        settings["timestep_spacing"] = "trailing"
    if timestep_spacing is not None:
        settings["timestep_spacing"] = timestep_spacing
    config = {key: value for key, value in settings.items() if key in known}
    config["_class_name"] = class_name
    return table_from_scheduler(config, steps, timesteps, constants.ETA if eta is None else eta, strength)


@lru_cache(maxsize=16)
def sampler_of(settings: SamplerSettings) -> SamplerTable:
    """The sampler that a plan asks for. Raises: InputError, as `build_sampler`."""
    return build_sampler(*astuple(settings))


def table_from_scheduler(
    config: Mapping[str, Any],
    steps: int,
    timesteps: Sequence[int] = (),
    eta: float = constants.ETA,
    strength: float = 1.0,
) -> SamplerTable:
    """The table of a diffusers scheduler, such as a checkpoint's own.

    Args:
        config: as in `scheduler_config.json`, with `_class_name`.
        steps: number of denoising steps, 1 or more.
        timesteps: of the steps, descending, instead of those that the scheduler chooses.
        eta: share of fresh noise in the steps of TCD.
        strength: share of the steps that are run, as in `build_sampler`.

    Raises:
        InputError: another class than DDIM, Euler (discrete or ancestral), DPM-Solver++ (orders 1 and 2), LCM or TCD; a
            setting that makes the update non-linear (thresholding, sample clipping) or that isn't covered; or steps
            that the scheduler can't do.
    """
    name = str(config.get("_class_name"))
    if name not in DEFAULTS:
        raise InputError(f"scheduler {name} is not supported", expected=f"one of {', '.join(DEFAULTS)}")
    most = config.get("num_train_timesteps", constants.TRAIN_STEPS)  # Euler would do more at one time step
    if isinstance(most, int) and most > 1 and not 1 <= steps <= most:
        raise InputError(f"{steps} denoising steps", expected=f"a whole number from 1 to {most}")
    _refuse_unsupported(name, config)
    if timesteps and name == "EulerAncestralDiscreteScheduler":
        raise InputError(Field("timesteps"), " with ancestral steps", expected=("another ", Field("scheduler")))
    try:
        fresh = noise_schedule(name, config, steps, timesteps)
        skipped = len(fresh.timesteps) - last_calls(len(fresh.timesteps), strength)
        match name:
            case "LCMScheduler":
                rows = lcm_rows(fresh)
            case "TCDScheduler":
                rows = tcd_rows(fresh, eta)
            case _:
                rows = solver_rows(fresh, skipped, explicit=bool(timesteps))
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{name} can't do {steps} steps ({error}); try another number of steps") from error
    if skipped == len(fresh.timesteps):
        raise InputError(Field("strength"), f" {strength:g} leaves none of {skipped} steps", expected="more of either")
    signal, sigma = (float(rows.pop(name)[skipped]) for name in ("alpha", "sigma"))
    table = SamplerTable(
        timestep=fresh.timesteps[skipped:].float(),
        **{column: values[skipped:].float() for column, values in rows.items()},
        initial_sigma=sigma if skipped else fresh.initial_sigma,
        initial_signal=signal if skipped else 0.0,
        skipped=skipped,
    )
    if not table.coefficients().isfinite().all():
        if fresh.config["rescale_betas_zero_snr"] and fresh.config["prediction_type"] == "epsilon":
            raise InputError(
                f"{name} can't start from pure noise (",
                Field("zero_terminal_snr"),
                ") with epsilon prediction, which divides by the signal",
                expected=(Field("prediction_type"), " v_prediction or sample, or ", Field("zero_terminal_snr"), " off"),
            )
        raise InputError(
            f"{name} with {steps} steps and {fresh.config['prediction_type']} prediction divides by zero: two steps "
            "share one noise level, or the first has no signal; try fewer steps"
        )
    return table


def _refuse_unsupported(name: str, config: Mapping[str, Any]) -> None:
    """Names the first setting of a scheduler configuration that a linear two-step table can't express."""
    if config.get("thresholding"):
        raise InputError(f"{name} with thresholding=True is not linear", expected="thresholding=False")
    # DDIM clips unless told not to; the others have no such setting or leave it off.
    if config.get("clip_sample", name == "DDIMScheduler"):
        raise InputError(f"{name} with clip_sample=True is not linear", expected="clip_sample=False")
    if (prediction := config.get("prediction_type", "epsilon")) not in constants.PREDICTION_TYPES:
        raise InputError(
            f"{name} with prediction_type={prediction!r}", expected=f"one of {', '.join(constants.PREDICTION_TYPES)}"
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


def _row(coefficients: Tensor, step_index: Tensor) -> dict[str, Tensor]:
    """Each column's value at the step counter, [1] fp32."""
    return dict(zip(COLUMNS, coefficients.index_select(0, step_index).unbind(dim=1), strict=True))
