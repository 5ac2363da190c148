"""What the launchers share: what they know about the machine, and how they refuse arguments."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from torch.library import wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor

ELEMENT_TYPES: Final = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 10·major + minor; 0 for another device."""
    major, minor = torch.cuda.get_device_capability(device.index or 0) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for another device."""
    return torch.cuda.get_device_properties(device.index or 0).multi_processor_count if device.type == "cuda" else 1


def interpreted(kernel: Any) -> bool:
    """Whether Triton runs the kernel in its interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    blocks: Mapping[str, Sequence[int]],
) -> None:
    """Starts a kernel, inside or outside of a compiler's tracing.

    Args:
        arguments: in the kernel's order; what it writes comes first: PyTorch counts arguments to find it, and
            descriptors shift what follows them.
        constants, options: compile-time arguments, and the compiler's options.
        blocks: of those arguments that the kernel takes as tensor descriptors.
    """
    if not blocks:
        wrap_triton(kernel)[grid](*arguments.values(), **constants, **options)
        return
    if wrap_triton(kernel) is kernel:
        described = {name: TensorDescriptor.from_tensor(arguments[name], list(block)) for name, block in blocks.items()}
        kernel[grid](*{**arguments, **described}.values(), **constants, **options)
        return
    # Outside of Dynamo, wrap_triton records no descriptors (torch 2.11 to 2.13); this is the node that Dynamo records:
    # tensors instead of descriptors, the blocks beside them, and the options as those of a single configuration.
    single = triton.autotune([triton.Config({}, **options)], key=[])(kernel)
    symbolic: dict[str, list[int | torch.SymInt]] = {name: [*block] for name, block in blocks.items()}
    triton_kernel_wrapper_mutation(
        kernel_idx=wrap_triton(single).kernel_idx,
        constant_args_idx=kernel_side_table.add_constant_args({}),
        grid=[grid],
        tma_descriptor_metadata={name: create_tma_stable_metadata(block) for name, block in symbolic.items()},
        kwargs={**arguments, **constants},
    )


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

    def factor(self, factor: Tensor | None, x: Tensor, name: str = "x") -> None:
        """One number for an e4m3 result, on the device of x; or none."""
        if factor is not None and (factor.dtype != torch.float32 or factor.shape != (1,) or factor.device != x.device):
            found = f"{factor.dtype} {list(factor.shape)} on {factor.device}"
            raise self.refusal("factor", found, f"float32 [1] with {name}")

    def device(self, name: str, tensor: Tensor, kernel: Any) -> None:
        """On a device on which the kernel runs."""
        if tensor.device.type == "cpu":
            if not interpreted(kernel):
                expected = "a CUDA tensor (on a CPU only with TRITON_INTERPRET=1, for tests)"
                raise self.refusal(name, "on cpu", expected)
        elif tensor.device.type not in ("cuda", "meta"):
            raise self.refusal(name, f"on {tensor.device}", "a CUDA tensor")
