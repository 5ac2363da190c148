"""The modes of `bench frontier`: ways to draw the same stories with less work, as data. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from storyadapter.method.constants import ITERATIONS, reference_scales

EXACT: Final = "exact"


@dataclass(frozen=True)
class Mode:
    """Settings of a `RunPlan` that differ from the published method's.

    Attributes:
        early_steps: denoising steps of the first half of the iterations; None: as those of the rest.
        iterations: after the text-only one, at most; None: as many as asked for.
        lora: whether the model has its LCM-LoRA fused.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    early_steps: int | None = None
    iterations: int | None = None
    lora: bool = False

    def plan_settings(self, iterations: int) -> dict[str, Any]:
        """For a run of so many iterations after the text-only one."""
        count = min(iterations, self.iterations or iterations)
        found: dict[str, Any] = {**self.settings, "scales": reference_scales(count)}
        if self.early_steps is not None:
            early = (1 + count) // 2
            found["steps"] = (self.early_steps,) * early + (found["steps"],) * (1 + count - early)
        return found


def _solver(steps: int, **more: Any) -> dict[str, Any]:
    return {"scheduler": "dpmpp_2m", "steps": steps, **more}


def _lcm(steps: int, **more: Any) -> dict[str, Any]:
    return {"scheduler": "lcm", "steps": steps, "guidance": 1.0, **more}


_INTERVAL: Final = {"guidance_interval": (0.0, 0.6)}
_STRENGTH: Final = {"strength": 0.6}
MODES: Final[Mapping[str, Mode]] = MappingProxyType(
    {
        EXACT: Mode(),
        "25 steps": Mode({"steps": 25}),
        "10 steps": Mode({"steps": 10}),
        "early 20": Mode({"steps": 50}, early_steps=20),
        "interval": Mode(_INTERVAL),
        "strength": Mode(_STRENGTH),
        "half the iterations": Mode(iterations=ITERATIONS // 2),
        "dpmpp 20": Mode(_solver(20)),
        "dpmpp 12": Mode(_solver(12)),
        "dpmpp 8": Mode(_solver(8)),
        "dpmpp 12, early 6": Mode(_solver(12), early_steps=6),
        "dpmpp 12, interval": Mode(_solver(12, **_INTERVAL)),
        "dpmpp 12, strength": Mode(_solver(12, **_STRENGTH)),
        "dpmpp 12, interval, strength": Mode(_solver(12, **_INTERVAL, **_STRENGTH)),
        "dpmpp 8, interval": Mode(_solver(8, **_INTERVAL)),
        "dpmpp 8, interval, half the iterations": Mode(_solver(8, **_INTERVAL), iterations=ITERATIONS // 2),
        "dpmpp 8, interval, early 6": Mode(_solver(8, **_INTERVAL), early_steps=6),
        "dpmpp 6, interval": Mode(_solver(6, **_INTERVAL)),
        "dpmpp 6, interval, half the iterations": Mode(_solver(6, **_INTERVAL), iterations=ITERATIONS // 2),
        "dpmpp 6, interval, 3 iterations": Mode(_solver(6, **_INTERVAL), iterations=3),
        "dpmpp 5, interval, half the iterations": Mode(_solver(5, **_INTERVAL), iterations=ITERATIONS // 2),
        "dpmpp 4, interval": Mode(_solver(4, **_INTERVAL)),
        "dpmpp 4, interval, half the iterations": Mode(_solver(4, **_INTERVAL), iterations=ITERATIONS // 2),
        "dpmpp 8, interval, strength": Mode(_solver(8, **_INTERVAL, **_STRENGTH)),
        "dpmpp 6, trailing": Mode(_solver(6, timestep_spacing="trailing")),
        "lcm 8": Mode(_lcm(8), lora=True),
        "lcm 4": Mode(_lcm(4), lora=True),
        "lcm 8, early 4": Mode(_lcm(8), early_steps=4, lora=True),
        "lcm 8, strength": Mode(_lcm(8, **_STRENGTH), lora=True),
    }
)
