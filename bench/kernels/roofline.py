"""The device's measured limits and the time below which a kernel can't go on it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from storyadapter.bench.timing import measure

_MATRIX_SIZE = 8192
_COPY_BYTES = 1 << 30
_EXP2_ROUNDS = 512
_EXP2_BLOCK = 4096


@triton.jit
def _exp2_kernel(data, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """x = 2^-x, again and again: it settles near 0.64, so no operand is ever special."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(data + offsets)
    for _ in tl.static_range(ROUNDS):
        values = tl.exp2(-values)
    tl.store(data + offsets, values)


@dataclass(frozen=True)
class Rates:
    """Measured limits of one device."""

    matrix_flops: float  # operations per second of a large matrix product on random data
    exp2_per_second: float  # base-2 exponentials per second, fp32
    copy_bytes: float  # bytes read plus bytes written per second of a large copy on the device

    def floor_ms(self, operations: int, exponentials: int, bytes_moved: int) -> dict[str, float]:
        """The least milliseconds for each; the largest of the three is the roofline."""
        return {
            "matrix": operations / self.matrix_flops * 1e3,
            "exp2": exponentials / self.exp2_per_second * 1e3,
            "bytes": bytes_moved / self.copy_bytes * 1e3,
        }


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measures all three on a CUDA device, in about a second."""
    generator = torch.Generator(device).manual_seed(0)
    size = (_MATRIX_SIZE, _MATRIX_SIZE)
    a, b = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
    # Short bursts, so that the power limit doesn't lower the rate: a kernel among others runs at the burst's clock.
    burst = functools.partial(measure, device=device, warmup_seconds=0.002, graph=False)
    product = burst([lambda: a @ b], functools.partial(_finite, a @ b))

    sources = [torch.empty(_COPY_BYTES // 4, device=device).normal_(generator=generator) for _ in range(2)]
    target = torch.empty_like(sources[0])
    copies = [
        burst(
            [functools.partial(copy, source, target) for source in sources],
            functools.partial(_copied, copy, sources[0], target),
        )
        for copy in (_copy_engine, _copy_kernel)
    ]

    programs = torch.cuda.get_device_properties(device).multi_processor_count * 64
    values = torch.rand(programs * _EXP2_BLOCK, generator=generator, device=device)

    def exponentials() -> None:
        _exp2_kernel[(programs,)](values, ROUNDS=_EXP2_ROUNDS, BLOCK=_EXP2_BLOCK, num_warps=8)

    exp2 = measure([exponentials], functools.partial(_settled, exponentials, values), device)
    return Rates(
        matrix_flops=2 * _MATRIX_SIZE**3 / product.median * 1e3,
        exp2_per_second=programs * _EXP2_BLOCK * _EXP2_ROUNDS / exp2.median * 1e3,
        copy_bytes=2 * _COPY_BYTES / min(copy.median for copy in copies) * 1e3,
    )


def _copy_engine(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def _copy_kernel(source: torch.Tensor, target: torch.Tensor) -> None:
    torch.mul(source, 1.0, out=target)


def _copied(copy: Callable[[torch.Tensor, torch.Tensor], None], source: torch.Tensor, target: torch.Tensor) -> None:
    target.zero_()
    copy(source, target)
    if not torch.equal(source, target):
        raise RuntimeError("the copy that measures the memory's rate copied something else")


def _finite(product: torch.Tensor) -> None:
    if not bool(product.isfinite().all()):
        raise RuntimeError("the matrix product that measures the matrix rate is not finite")


def _settled(run: Callable[[], None], values: torch.Tensor) -> None:
    run()
    if not torch.allclose(values, torch.full_like(values, 0.6411857), atol=1e-4):
        raise RuntimeError("the loop that measures the exp2 rate did not settle at its fixed point")
