"""Time steps and noise levels of diffusers' schedulers, from a configuration as in `scheduler_config.json`.

They are computed here, to the bit as diffusers 0.42 does, because importing one of its schedulers imports PyTorch's
compiler, which takes longer than everything else between typing a command and its first step.

Sources: `set_timesteps` of https://github.com/huggingface/diffusers/tree/v0.42.0/src/diffusers/schedulers (Apache
License 2.0); zero terminal SNR (arXiv 2305.08891), Karras steps (arXiv 2206.00364), uniform log-SNR (arXiv 2206.00927).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from storyadapter.method.constants import TRAIN_STEPS
from storyadapter.method.errors import said

_COMMON: Final[Mapping[str, Any]] = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_CHOSEN_SIGMAS: Final[Mapping[str, Any]] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
_THRESHOLDING: Final[Mapping[str, Any]] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CONSISTENCY: Final[Mapping[str, Any]] = {
    **_COMMON,
    **_THRESHOLDING,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
# by the class of a scheduler, what its configuration may say and what it says if it doesn't
DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "DDIMScheduler": {
        **_COMMON,
        **_THRESHOLDING,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    },
    "EulerDiscreteScheduler": {
        **_COMMON,
        **_CHOSEN_SIGMAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": _COMMON,
    "DPMSolverMultistepScheduler": {
        **_COMMON,
        **_CHOSEN_SIGMAS,
        **_THRESHOLDING,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "LCMScheduler": _CONSISTENCY,
    "TCDScheduler": _CONSISTENCY,
}
_LEADING: Final = ("DDIM", "DDPM", "PNDM", "LCM", "TCD", "CogVideoX")  # beginnings of names
_MOST_TRAINED: Final = 100_000  # training steps; SDXL has 1000
_RHO: Final = 7.0


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A scheduler whose time steps are set; T training steps, K steps."""

    name: str  # the class in diffusers
    config: Mapping[str, Any]  # defaults filled in
    steps: int  # as asked for; with trailing time steps that don't divide the training steps, K is another number
    timesteps: Tensor  # [K] int64, or fp32 where they needn't be whole
    alphas_cumprod: Tensor  # [T] fp32, of the training steps
    sigmas: Tensor | None  # [K + 1] fp32, relative to the signal, the last after all steps; None where α and σ are used
    initial_sigma: float  # factor of the initial noise

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """After the last step, of schedulers without `sigmas`."""
        return torch.tensor(1.0) if self.config["set_alpha_to_one"] else self.alphas_cumprod[0]


def default_spacing(name: str) -> str:
    """The time steps of any diffusers scheduler whose configuration names none."""
    return "leading" if name.startswith(_LEADING) else "linspace"


def noise_schedule(name: str, settings: Mapping[str, Any], steps: int, timesteps: Sequence[int] = ()) -> NoiseSchedule:
    """The schedule of a class in `DEFAULTS`.

    Args:
        settings: what else is in them is left unread.
        steps: K, 1 or more.
        timesteps: descending, instead of those that the scheduler chooses.

    Raises:
        ValueError: a setting has a value that is none, or so many steps can't be had.
    """
    defaults = DEFAULTS[name]
    config = {key: settings.get(key, default) for key, default in defaults.items()}
    trained = config["num_train_timesteps"]
    if isinstance(trained, bool) or not isinstance(trained, int) or not 1 <= trained <= _MOST_TRAINED:
        raise ValueError(f"num_train_timesteps is {trained!r}")
    try:
        with np.errstate(all="ignore"):  # what isn't finite is told of the whole table
            if name in ("LCMScheduler", "TCDScheduler"):
                return _consistency(name, config, steps, timesteps)
            if name == "DDIMScheduler":
                times = np.array(timesteps) if timesteps else _spaced(config, trained, steps, steps)
                told = torch.from_numpy(times.astype(np.int64))
                return NoiseSchedule(name, config, steps, told, _alphas(config), None, 1.0)
            if name == "DPMSolverMultistepScheduler":
                return _dpm_solver(name, config, steps, timesteps)
            return _euler(name, config, steps, timesteps)
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"a setting of its configuration is none: {said(error)}") from error


def _alphas(config: Mapping[str, Any]) -> Tensor:
    """ᾱ of every training step, [T] fp32."""
    count, first, last = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        if betas.shape != (count,):
            raise ValueError(f"trained_betas has the shape {list(betas.shape)}, num_train_timesteps is {count}")
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(first, last, count, dtype=torch.float32)
    elif config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        bar = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
        betas = torch.tensor([min(1 - bar[step + 1] / bar[step], 0.999) for step in range(count)], dtype=torch.float32)
    else:
        raise ValueError(f"beta_schedule is {config['beta_schedule']!r}")
    if not config["rescale_betas_zero_snr"]:
        return torch.cumprod(1.0 - betas, dim=0)
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    start, end = signal[0].clone(), signal[-1].clone()
    signal -= end
    signal *= start / (start - end)
    squared = signal**2
    # through betas and back, as diffusers has it: every rounding counts
    betas = 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])
    return torch.cumprod(1.0 - betas, dim=0)


def _spaced(config: Mapping[str, Any], last: int, steps: int, divisor: int) -> np.ndarray:
    """Descending time steps; `last` of the training steps are used, `divisor` sets how far leading ones are apart."""
    trained, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, last - 1, divisor).round()[::-1][:steps]
    if spacing == "leading":
        return (np.arange(0, divisor) * (last // divisor)).round()[::-1][:steps] + config["steps_offset"]
    if spacing == "trailing":
        return np.arange(last, 0, -trained / steps).round() - 1
    raise ValueError(f"timestep_spacing is {spacing!r}")


def _consistency(name: str, config: Mapping[str, Any], steps: int, timesteps: Sequence[int]) -> NoiseSchedule:
    """LCM and TCD: some of the steps that they were distilled on."""
    original = config["original_inference_steps"]
    trained = np.arange(1, original + 1) * (config["num_train_timesteps"] // original) - 1
    if timesteps:
        chosen = np.array(timesteps, np.int64)
    elif steps > len(trained):
        raise ValueError(f"it was trained with {len(trained)}")
    else:
        chosen = trained[::-1][np.floor(np.linspace(0, len(trained), num=steps, endpoint=False)).astype(np.int64)]
    return NoiseSchedule(name, config, steps, torch.from_numpy(chosen.copy()), _alphas(config), None, 1.0)


def _noise_levels(config: Mapping[str, Any]) -> tuple[Tensor, np.ndarray]:
    """ᾱ and σ/α of every training step, [T] fp32 each."""
    alphas = _alphas(config)
    if config["rescale_betas_zero_snr"]:
        alphas[-1] = 2**-24  # where no signal is left, a little is, so that its noise can be told
    return alphas, (((1 - alphas) / alphas) ** 0.5).numpy()


def _with_last(sigmas: np.ndarray, config: Mapping[str, Any], alphas: Tensor) -> Tensor:
    match config.get("final_sigmas_type", "zero"):
        case "zero":
            last = 0.0
        case "sigma_min":
            last = float(((1 - alphas[0]) / alphas[0]) ** 0.5)
        case other:
            raise ValueError(f"final_sigmas_type is {other!r}")
    return torch.from_numpy(np.concatenate([sigmas, [last]]).astype(np.float32))


def _chosen_sigmas(config: Mapping[str, Any], sigmas: np.ndarray, steps: int, timesteps: Sequence[int]) -> Any:
    """Noise levels that aren't those of time steps, from the largest and the smallest of `sigmas`; None if none are
    asked for."""
    kinds = [key for key in ("karras", "exponential", "beta") if config[f"use_{key}_sigmas"]]
    if not kinds:
        return None
    if len(kinds) > 1 or timesteps:
        raise ValueError(f"use_{kinds[-1]}_sigmas with {f'use_{kinds[0]}_sigmas' if len(kinds) > 1 else 'time steps'}")
    low = sigmas[-1].item() if config.get("sigma_min") is None else config["sigma_min"]
    high = sigmas[0].item() if config.get("sigma_max") is None else config["sigma_max"]
    if kinds == ["karras"]:
        inner, outer = low ** (1 / _RHO), high ** (1 / _RHO)
        return (outer + np.linspace(0, 1, steps) * (inner - outer)) ** _RHO
    if kinds == ["exponential"]:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    raise ValueError("use_beta_sigmas isn't read")


def _times_of(sigmas: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The time steps of noise levels, between those of the training steps (log σ in `levels`)."""
    found = []
    for sigma in sigmas:
        log_sigma = np.log(np.maximum(sigma, 1e-10))
        low = np.cumsum(log_sigma - levels >= 0).argmax().clip(max=len(levels) - 2)
        share = np.clip((levels[low] - log_sigma) / (levels[low] - levels[low + 1]), 0, 1)
        found.append((1 - share) * low + share * (low + 1))
    return np.array(found)


def _euler(name: str, config: Mapping[str, Any], steps: int, timesteps: Sequence[int]) -> NoiseSchedule:
    """Euler, ancestral or not: fp32 time steps."""
    alphas, every = _noise_levels(config)
    continuous = config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction"
    if timesteps:
        if continuous:
            raise ValueError("timestep_type 'continuous' with time steps")
        times = np.array(timesteps).astype(np.float32)
    elif config["timestep_spacing"] == "linspace":
        times = np.linspace(0, config["num_train_timesteps"] - 1, steps, dtype=np.float32)[::-1].copy()
    else:
        times = _spaced(config, config["num_train_timesteps"], steps, steps).astype(np.float32)
    match config.get("interpolation_type", "linear"):
        case "linear":
            sigmas = np.interp(times, np.arange(0, len(every)), every)
        case "log_linear":
            sigmas = torch.linspace(np.log(every[-1]), np.log(every[0]), steps + 1).exp().numpy()
        case other:
            raise ValueError(f"interpolation_type is {other!r}")
    if "use_karras_sigmas" in config:
        chosen = _chosen_sigmas(config, sigmas, steps, timesteps)
        if chosen is not None:
            sigmas, times = chosen, _times_of(chosen, np.log(every))
    levels = _with_last(sigmas, config, alphas)
    told = torch.from_numpy(times.astype(np.float32))
    if continuous:
        told = torch.tensor([0.25 * sigma.log() for sigma in levels[:-1]])
    largest = levels.max()
    initial = largest if config["timestep_spacing"] in ("linspace", "trailing") else (largest**2 + 1) ** 0.5
    return NoiseSchedule(name, config, steps, told, alphas, levels, float(initial))


def _dpm_solver(name: str, config: Mapping[str, Any], steps: int, timesteps: Sequence[int]) -> NoiseSchedule:
    alphas, every = _noise_levels(config)
    log_every = np.log(every)
    if timesteps:
        times = np.array(timesteps).astype(np.int64)
    else:
        log_ratio = torch.log(torch.sqrt(alphas)) - torch.log(torch.sqrt(1 - alphas))
        clipped = torch.searchsorted(torch.flip(log_ratio, [0]), config["lambda_min_clipped"])
        last = config["num_train_timesteps"] - int(clipped)
        trails = config["timestep_spacing"] == "trailing"
        times = _spaced(config, last, steps, steps if trails else steps + 1).astype(np.int64)
    sigmas = _chosen_sigmas(config, np.flip(every), steps, timesteps)
    if config["use_lu_lambdas"] and not config["use_karras_sigmas"]:
        if timesteps:
            raise ValueError("use_lu_lambdas with time steps")
        low, high = log_every[0].item(), log_every[-1].item()
        sigmas = np.exp(high + np.linspace(0, 1, steps) * (low - high))
    if sigmas is None:
        sigmas = np.interp(times, np.arange(0, len(every)), every)
    else:
        times = _times_of(sigmas, log_every)
        if config["beta_schedule"] != "squaredcos_cap_v2" and (config["use_karras_sigmas"] or config["use_lu_lambdas"]):
            times = times.round()
    levels = _with_last(sigmas, config, alphas)
    return NoiseSchedule(name, config, steps, torch.from_numpy(times.astype(np.int64)), alphas, levels, 1.0)
