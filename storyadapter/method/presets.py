"""Settings of a plan by one word each: what few-step models need, as their authors' model cards have them, and two
cheaper ways to draw with any other model, as they were measured (`bench/results/frontier-h200.md`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from storyadapter.method.constants import GUIDANCE, ITERATIONS, SAMPLERS, TRAINED_STEPS, reference_scales
from storyadapter.method.errors import Field, InputError


@dataclass(frozen=True)
class Preset:
    """Settings of a `RunPlan`, for one kind of model.

    `embeds_guidance`: whether the model's UNet takes the guidance as an embedding.
    """

    purpose: str
    settings: Mapping[str, Any]
    embeds_guidance: bool = False


_FEW_ROUNDS: Final = {
    "scheduler": "dpmpp_2m",
    "guidance_interval": (0.0, 0.6),
    "scales": reference_scales(ITERATIONS // 2),
}
PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "balanced": Preset(
            "any model that isn't a few-step one, at 5 % of the published cost; other pictures, whose consistency and "
            "fidelity were as good as the published settings' by measure, on the demo model",
            {**_FEW_ROUNDS, "steps": 6},
        ),
        "fast": Preset(
            "the same at 3 %; it kept at least 95 % of either measure, on the demo model", {**_FEW_ROUNDS, "steps": 4}
        ),
        "lcm": Preset(
            "the UNet of latent-consistency/lcm-sdxl, as in the published fast mode",
            {"scheduler": "lcm", "steps": 4, "guidance": 8.0},
            embeds_guidance=True,
        ),
        "lcm-lora": Preset("latent-consistency/lcm-lora-sdxl", {"scheduler": "lcm", "steps": 8, "guidance": 1.0}),
        "lightning": Preset(
            "SDXL-Lightning, UNet or LoRA, of 4 steps; for others type their number",
            {"scheduler": "euler", "timestep_spacing": "trailing", "steps": 4, "guidance": 0.0},
        ),
        "hyper": Preset(
            "Hyper-SDXL's LoRA of 4 steps; for those of 2 and 8 type their number",
            {"scheduler": "ddim", "timestep_spacing": "trailing", "steps": 4, "guidance": 0.0},
        ),
        "hyper-cfg": Preset(
            "Hyper-SDXL's LoRA of 8 steps with guidance; for that of 12 type the number",
            {"scheduler": "ddim", "timestep_spacing": "trailing", "steps": 8, "guidance": 5.0},
        ),
        "tcd": Preset(
            "h1t/TCD-SDXL-LoRA; with eta 1 Hyper-SDXL's unified LoRA",
            {"scheduler": "tcd", "eta": 0.3, "steps": 4, "guidance": 0.0},
        ),
        "dmd2": Preset(
            "DMD2, UNet or LoRA, of 4 steps", {"scheduler": "lcm", "timesteps": (999, 749, 499, 249), "guidance": 0.0}
        ),
        "turbo": Preset(
            "stabilityai/sdxl-turbo, for frames of 512x512",
            {"scheduler": "euler_a", "timestep_spacing": "trailing", "steps": 4, "guidance": 0.0},
        ),
    }
)


def with_preset(name: str | None, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a preset and those that were typed beside it, which win; what these leave without a meaning goes."""
    if name is None:
        return dict(typed)
    settings = dict(PRESETS[name].settings)
    if "timesteps" in typed:
        settings.pop("steps", None)
        settings.pop("timestep_spacing", None)
    if typed.keys() & {"steps", "timestep_spacing"}:
        settings.pop("timesteps", None)
    scheduler = typed.get("scheduler", settings["scheduler"])
    if scheduler != "tcd":
        settings.pop("eta", None)
    if SAMPLERS.get(scheduler) in TRAINED_STEPS:
        settings.pop("timestep_spacing", None)
    guidance = typed.get("guidance", GUIDANCE)
    if max(guidance if isinstance(guidance, Sequence) else (guidance,)) <= 1:
        settings.pop("guidance_interval", None)
    return {**settings, **typed}


def check_preset(name: str | None, embeds_guidance: bool) -> None:
    """Raises InputError: the preset is for another kind of UNet than the model's."""
    if name is None or PRESETS[name].embeds_guidance == embeds_guidance:
        return
    if embeds_guidance:
        fitting = " or ".join(other for other, preset in PRESETS.items() if preset.embeds_guidance)
        found = f" {name} is for a UNet without it, but this one takes the guidance as an embedding"
        raise InputError(Field("preset"), found, expected=(Field("preset"), f" {fitting}"))
    raise InputError(
        Field("preset"),
        f" {name} is for a UNet that takes the guidance as an embedding (time_cond_proj_dim), this one doesn't",
        advice=("give such a one with ", Field("unet"), ", or take ", Field("preset"), " lcm-lora with the LCM LoRA"),
    )
