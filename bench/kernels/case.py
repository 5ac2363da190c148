"""What every case of the kernel benchmark is: one call of a kernel, with its inputs, its meaning and its costs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from storyadapter.bench.kernels.baselines import Baseline

# A compiled kernel serves every number of rows and queries that is a multiple of 16: few will do to compile one.
COMPILED_ROWS: Final = 256


class KernelCase(ABC):
    """One call of a kernel.

    Attributes:
        kernel: what the benchmark calls it.
        operator: name of `run`.
        run: the operator that is measured, with the stored tiles, from `kernel_inputs`.
        columns: of a report, and what `as_data` calls them.
        warmup_seconds: until clocks have settled.
        tolerance: error against fp32 that is right, where that isn't what half precision gives.
        matrix_speed: of its operands' products over that of half precision.
        element_bytes: of what its tiles are stored for.
        least: sizes of the least case for which the same kernel is compiled.
        baselines: gives what it is compared with.
    """

    kernel: ClassVar[str]
    operator: ClassVar[str]
    run: ClassVar[Callable[..., Any]]
    columns: ClassVar[dict[str, str]]
    warmup_seconds: ClassVar[float] = 0.05
    tolerance: ClassVar[float | None] = None
    matrix_speed: ClassVar[int] = 1
    element_bytes: ClassVar[int] = 2
    least: ClassVar[dict[str, int]] = {"M": COMPILED_ROWS}
    baselines: ClassVar[Callable[..., list[Baseline]]]

    def as_data(self) -> dict[str, Any]:
        """The shape, as JSON data."""
        return asdict(self)  # type: ignore[call-overload]  # the cases are dataclasses

    @property
    def cells(self) -> list[str]:
        """The shape, for a report."""
        return [str(self.as_data()[name]) for name in self.columns.values()]

    @property
    def operations(self) -> int:
        """Floating-point operations of matrix products."""
        return 0

    @property
    def exponentials(self) -> int:
        """That can't be avoided."""
        return 0

    @abstractmethod
    def bytes_moved(self, element_bytes: int) -> int:
        """Each input read once, each output written once."""

    def smallest(self) -> Self:
        """The least case for which the same kernel is compiled."""
        return replace(self, **self.least)  # type: ignore[type-var]  # the cases are dataclasses

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Random inputs, in the layout of PyTorch's own operators."""

    def kernel_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as the kernel takes them."""
        return inputs

    def baseline_inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as baselines take them."""
        return inputs

    @abstractmethod
    def expected(self, *inputs: Tensor) -> Any:
        """The result in fp32: a tensor, or several."""

    @abstractmethod
    def launch(self, tiles: Any, *inputs: Tensor) -> Any:
        """The kernel with other tiles, from `kernel_inputs`."""


@dataclass(frozen=True)
class MatrixCase(KernelCase):
    """A product of x [M, K] with a weight [N, K], or [2·N, K] of a GEGLU."""

    M: int
    K: int
    N: int

    columns: ClassVar[dict[str, str]] = {"M": "M", "K": "K", "N": "N"}
    warmup_seconds: ClassVar[float] = 0.15  # products at full rate run into the power limit


def normal(seed: int, dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal numbers of these shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
