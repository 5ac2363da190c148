"""Rounding to e4m3, 8 bits with 4 of exponent and 3 of mantissa: what all kernels that write it do."""

import triton
import triton.language as tl

# The largest finite number of the format, which has no infinity.
LARGEST = tl.constexpr(448.0)


@triton.jit
def to_e4m3(x):
    """fp32 → e4m3, to the nearest, ties to even; what lies beyond ±448 becomes ±448, and NaN stays NaN."""
    above = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
