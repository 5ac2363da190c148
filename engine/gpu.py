"""What the NVIDIA driver tells of itself and of a GPU, by its management library (NVML)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pynvml
import torch

Told = TypeVar("Told")


def _ask(question: Callable[[], Told]) -> Told | None:
    """The answer, or None without a driver, or where it doesn't tell this of that GPU."""
    try:
        pynvml.nvmlInit()  # counted; after the first time it does nothing more
        return question()
    except pynvml.NVMLError:
        return None


def driver_version() -> str:
    """The driver's version, such as "580.95.05"; "unknown" without one."""
    return _ask(pynvml.nvmlSystemGetDriverVersion) or "unknown"


@dataclass(frozen=True)
class NvidiaGpu:
    """A GPU, as the driver knows it; each number is None where it isn't told."""

    handle: Any

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """The GPU of a CUDA device, whatever devices this process sees; None where the driver can't be asked."""
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = _ask(lambda: pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        return None if handle is None else cls(handle)

    @property
    def power_limit(self) -> float | None:
        """Watts that it may draw."""
        milliwatts = _ask(lambda: pynvml.nvmlDeviceGetPowerManagementLimit(self.handle))
        return None if milliwatts is None else milliwatts / 1000

    @property
    def power(self) -> float | None:
        """Watts that it draws now."""
        milliwatts = _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(self.handle))
        return None if milliwatts is None else milliwatts / 1000

    @property
    def highest_sm_clock(self) -> int | None:
        """MHz of its multiprocessors at the most."""
        return _ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_SM))

    @property
    def sm_clock(self) -> int | None:
        """MHz of its multiprocessors now."""
        return _ask(lambda: pynvml.nvmlDeviceGetClockInfo(self.handle, pynvml.NVML_CLOCK_SM))
