"""What a model's files say of how it is sampled. Imports nothing heavy."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSampling:
    """What a model says of its own sampling; None or empty where it says nothing.

    Attributes:
        prediction_type, zero_terminal_snr: facts of the weights, as the UNet was trained.
        source: which file says so.
        embeds_guidance: whether the UNet takes the guidance as an embedding, and so needs no unconditional rows.
        scheduler: the configuration of the scheduler that it comes with, as in `scheduler_config.json`.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    source: str = ""
    scheduler: str = ""
    embeds_guidance: bool = False

    @property
    def configuration(self) -> dict[str, Any]:
        """`scheduler` as data."""
        return json.loads(self.scheduler) if self.scheduler else {}
