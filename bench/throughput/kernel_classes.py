"""Where one UNet call spends its time: kernels by class, from the profiler."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

# The first class whose pattern is found in a kernel's name has it. Names are those of cuDNN, cuBLAS, CUTLASS, PyTorch,
# and of Triton kernels: the project's own, and compiled ones, whose names list the operators that were fused.
CLASSES: Final = (
    ("grca", r"grca"),
    ("matrix products", r"geglu_kernel|triton_tem_fused"),
    ("norms", r"layer_?norm|group_?norm|RowwiseMoments|ComputeFusedParams"),
    ("elementwise", r"^triton_"),
    ("self-attention", r"flash|fmha|sdpa|attention"),
    ("convolutions", r"conv(?!ert)|fprop|implicit|winograd|nchwToNhwc|nhwcToNchw"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitK|gemv|xmma"),
    ("elementwise", r"elementwise|copy|memcpy|memset|cat|index|upsample|fill"),
)
OTHER: Final = "other"
NAMES: Final = (*dict.fromkeys(name for name, _ in CLASSES), OTHER)
_PATTERNS: Final = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES)


@dataclass(frozen=True)
class KernelTimes:
    """One call's kernels: milliseconds by class, their number, and the slowest of them by name."""

    milliseconds: dict[str, float]
    kernels: int
    slowest: tuple[tuple[str, str, float], ...]  # name, class, milliseconds of all its launches

    @property
    def total(self) -> float:
        """Milliseconds of all kernels."""
        return sum(self.milliseconds.values())


def class_of(name: str) -> str:
    """The class of a kernel by its name."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), OTHER)


def summarize(kernels: Iterable[tuple[str, float]], slowest: int = 12) -> KernelTimes:
    """Kernels by class, from pairs of a name and the milliseconds of one launch."""
    by_name: dict[str, float] = {}
    count = 0
    for name, milliseconds in kernels:
        by_name[name] = by_name.get(name, 0.0) + milliseconds
        count += 1
    by_class = dict.fromkeys(NAMES, 0.0)
    for name, milliseconds in by_name.items():
        by_class[class_of(name)] += milliseconds
    order = sorted(by_name, key=by_name.__getitem__, reverse=True)[:slowest]
    return KernelTimes(by_class, count, tuple((name[:120], class_of(name), by_name[name]) for name in order))


def profile_call(call: Callable[[], object], device: torch.device) -> KernelTimes:
    """The kernels of one call on a CUDA device, graph replays included; warm the call up first."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return summarize((event.name, event.time_range.elapsed_us() / 1e3) for event in events)
