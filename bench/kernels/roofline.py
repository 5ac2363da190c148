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
    copy_bytes_per_second: float  # bytes read plus bytes written per second of a large copy on the device

    def floor_ms(self, operations: int, exponentials: int, bytes_moved: int) -> dict[str, float]:
        """The least milliseconds for each; the largest of the three is the roofline."""
        return {
            "matrix": operations / self.matrix_flops * 1e3,
            "exp2": exponentials / self.exp2_per_second * 1e3,
            "bytes": bytes_moved / self.copy_bytes_per_second * 1e3,
        }


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measures all three on a CUDA device, in about a second."""
    generator = torch.Generator(device).manual_seed(0)
    size = (_MATRIX_SIZE, _MATRIX_SIZE)
    a, b = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
    # Short bursts, so that the power limit doesn't lower the rate: a kernel among others runs at the burst's clock.
    burst = functools.partial(measure, device=device, warmup_seconds=0.002, graph=False)
    product = burst([lambda: a @ b], lambda: _check(bool((a @ b).isfinite().all()), "matrix product is not finite"))

    sources = [torch.empty(_COPY_BYTES // 4, device=device).normal_(generator=generator) for _ in range(2)]
    target = torch.empty_like(sources[0])

    def copied(copy: Callable[[torch.Tensor], object]) -> None:
        target.zero_()
        copy(sources[0])
        _check(torch.equal(sources[0], target), "copy copied something else")

    ways = (target.copy_, lambda source: torch.mul(source, 1.0, out=target))  # the copy engine, and a kernel
    copies = [burst([functools.partial(way, s) for s in sources], functools.partial(copied, way)) for way in ways]

    programs = torch.cuda.get_device_properties(device).multi_processor_count * 64
    values = torch.rand(programs * _EXP2_BLOCK, generator=generator, device=device)

    def exponentials() -> None:
        _exp2_kernel[(programs,)](values, ROUNDS=_EXP2_ROUNDS, BLOCK=_EXP2_BLOCK, num_warps=8)

    def settled() -> None:
        exponentials()
        right = torch.allclose(values, torch.full_like(values, 0.6411857), atol=1e-4)
        _check(right, "loop of exponentials did not settle at its fixed point")

    exp2 = measure([exponentials], settled, device)
    return Rates(
        matrix_flops=2 * _MATRIX_SIZE**3 / product.median * 1e3,
        exp2_per_second=programs * _EXP2_BLOCK * _EXP2_ROUNDS / exp2.median * 1e3,
        copy_bytes_per_second=2 * _COPY_BYTES / min(copy.median for copy in copies) * 1e3,
    )


def _check(right: bool, wrong: str) -> None:
    if not right:
        raise RuntimeError(f"the {wrong}, by which a limit of the device was to be measured")
