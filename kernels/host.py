"""What the launchers know about the machine."""

import functools
from typing import Any

import torch
import triton

ELEMENT_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@functools.cache
def capability(index: int) -> int:
    """Compute capability of a CUDA device, 10·major + minor."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def processors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def interpreted(kernel: Any) -> bool:
    """Whether Triton runs the kernel in its interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)
