"""What one UNet call asks for, in operations, and where it spends its time: kernels by class, from the profiler."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from storyadapter.method import constants
from storyadapter.model.networks import Networks, idle_inputs
from storyadapter.runtime.memory import step_networks

# The first class whose pattern is found in a kernel's name has it. Names are those of cuDNN, cuBLAS, CUTLASS, PyTorch,
# and of Triton kernels: the project's own, and compiled ones, whose names list the operators that were fused.
CLASSES: Final = (
    ("grca", r"grca"),
    ("fp8 products", r"product_fp8"),
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


def attended_keys(frames: int, references: int) -> int:
    """Text and reference keys of all rows of a call: an unconditional row needs 4 reference tokens, others all."""
    unconditional = constants.TEXT_TOKENS + constants.TOKENS_PER_IMAGE
    conditional = constants.TEXT_TOKENS + constants.TOKENS_PER_IMAGE * references
    return frames * (unconditional + conditional)


def _attention_operations(q_shape: torch.Size, k_shape: torch.Size, *shapes: Any, **named: Any) -> int:
    batch, heads, queries, head_size = q_shape
    return 4 * batch * heads * queries * k_shape[2] * head_size


def count_operations(
    networks: Networks, frames: int, references: int, height: int, width: int, *, controlled: bool = False
) -> int:
    """Operations (a multiplication and an addition are two) of one call of the denoiser with 2·`frames` rows.

    Counted by `torch.utils.flop_counter` on one call of the eager denoiser: matrix products, convolutions and
    self-attentions. Its global reference cross-attentions are added as 4·S·C operations per attended key, S queries of
    width C: the two products of each attention. Elementwise work isn't counted.

    Args:
        networks: eager ones, whose denoiser computes the operator `storyadapter::grca`; a meta device will do.
        frames: F of the call.
        references: N, all of which the conditional rows attend to.
        height, width: of the pictures, in pixels.
        controlled: with one of each ControlNet before it.
    """
    scale, tokens = networks.geometry.pixels_per_latent, constants.TOKENS_PER_IMAGE * references
    letters = {"B": 2 * frames, "P": frames + 1, "G": 2, "R": tokens, "M": 1, "h": height // scale, "w": width // scale}
    keys = attended_keys(frames, references)

    def grca_operations(q_shape: torch.Size, *shapes: Any, out_shape: Any = None, **named: Any) -> int:
        _, queries, heads, head_size = q_shape
        return 4 * queries * heads * head_size * keys

    names = step_networks(networks) if controlled else ["denoiser"]
    inputs = {name: idle_inputs(networks, name, letters) for name in names}
    mapping = {
        torch.ops.storyadapter.grca: grca_operations,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,  # unknown to it
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        for name in names:
            networks[name](inputs[name])
    return counter.get_total_flops()
