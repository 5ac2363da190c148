"""What a report must say about where its numbers come from."""

import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from storyadapter.cli.machine import versions
from storyadapter.engine.gpu import NvidiaGpu, driver_version

_SAMPLE_SECONDS = 0.25


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit of the checkout this code lies in (`+changes` if files differ from it), or `unknown`."""
    here = Path(__file__).resolve()
    root = here.parents[1]
    # installed into an environment inside of another project's checkout, this file isn't one of that checkout's
    if _output("git", "ls-files", "--error-unmatch", str(here), cwd=root) is None:
        return "unknown"
    revision = _output("git", "rev-parse", "HEAD", cwd=root)
    if not revision:
        return "unknown"
    return f"{revision}+changes" if _output("git", "status", "--porcelain", "-uno", cwd=root) else revision


def describe(device: torch.device, source_commit: str | None = None) -> dict[str, str]:
    """Device, driver, power limit, versions, commit and command line, as text by name.

    Args:
        device: where the measurement runs.
        source_commit: the commit, where the checkout's own history did not travel with the files.
    """
    found: dict[str, str] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = driver_version()
        gpu = NvidiaGpu.of(device)
        if gpu and gpu.power_limit is not None:
            found["power limit"] = f"{gpu.power_limit:.2f} W"
        if gpu and gpu.highest_sm_clock is not None:
            found["highest SM clock"] = f"{gpu.highest_sm_clock} MHz"
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = platform.processor() or platform.machine()
    found |= versions("xformers")
    found["commit"] = source_commit or commit()
    spec = sys.modules["__main__"].__spec__
    program = Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
    found["command"] = " ".join([program, *sys.argv[1:]])
    return found


@dataclass
class Load:
    """What a GPU did while it was watched; empty on other devices."""

    clocks_mhz: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)

    def as_data(self) -> dict[str, float]:
        """Medians, for a report; empty without samples."""
        if not self.clocks_mhz:
            return {}
        return {"sm_clock_mhz": statistics.median(self.clocks_mhz), "watts": statistics.median(self.watts)}


@contextmanager
def watch(device: torch.device) -> Iterator[Load]:
    """Sample the SM clock and the power draw of a GPU several times a second, where the driver tells them."""
    load = Load()
    gpu = NvidiaGpu.of(device) if device.type == "cuda" else None
    if gpu is None:
        yield load
        return
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            clock, watts = gpu.sm_clock, gpu.power
            if clock is not None and watts is not None:
                load.clocks_mhz.append(clock)
                load.watts.append(watts)

    sampler = threading.Thread(target=sample, name="gpu-load")
    sampler.start()
    try:
        yield load
    finally:
        over.set()
        sampler.join()
