"""What the launchers share: what they know about the machine, and how they refuse arguments."""

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

ELEMENT_TYPES: Final = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 10·major + minor; 0 for another device."""
    return _capability(device.index or 0) if device.type == "cuda" else 0


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for another device."""
    return _processors(device.index or 0) if device.type == "cuda" else 1


def interpreted(kernel: Any) -> bool:
    """Whether Triton runs the kernel in its interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Checks:
    """Checks of an operator's arguments, which cost no synchronization; they raise ValueErrors of `refusal`."""

    operator: str

    def refusal(self, name: str, found: object, expected: str) -> ValueError:
        """An error that names the operator and the argument, to be raised."""
        return ValueError(f"{self.operator}: {name} is {found}; expected {expected}")

    def element_type(self, name: str, tensor: Tensor) -> None:
        """Of a dtype that the kernels are for."""
        if tensor.dtype not in ELEMENT_TYPES:
            raise self.refusal(name, tensor.dtype, "float16, bfloat16 or float32")

    def alike_and_contiguous(self, x: Tensor, **others: Tensor) -> None:
        """Others of the dtype and device of x, and all contiguous."""
        for name, tensor in others.items():
            if tensor.dtype != x.dtype:
                raise self.refusal(name, tensor.dtype, f"the dtype of x, {x.dtype}")
            if tensor.device != x.device:
                raise self.refusal(name, f"on {tensor.device}", f"the device of x, {x.device}")
        for name, tensor in {"x": x, **others}.items():
            if not tensor.is_contiguous():
                raise self.refusal(name, f"of strides {list(tensor.stride())}", "a contiguous tensor")

    def device(self, name: str, tensor: Tensor, kernel: Any) -> None:
        """On a device on which the kernel runs."""
        if tensor.device.type == "cpu":
            if not interpreted(kernel):
                expected = "a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"
                raise self.refusal(name, "on cpu", expected)
        elif tensor.device.type not in ("cuda", "meta"):
            raise self.refusal(name, f"on {tensor.device}", "a CUDA tensor")
