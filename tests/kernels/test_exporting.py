"""What is compiled takes every size that is asked for, those too that are the width of a layer by chance."""

from collections.abc import Callable
from typing import Final

import pytest
import torch
from torch import Tensor, nn

from storyadapter.kernels.geglu import geglu_triton
from storyadapter.kernels.group_norm import group_norm_triton
from storyadapter.kernels.layer_norm import add_layer_norm_triton
from storyadapter.kernels.products_fp8 import convolution_fp8_triton, geglu_fp8_triton, linear_fp8_triton
from storyadapter.quantization.layers import E4M3

WIDTH: Final = 64


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return meta(rows, columns, dtype=E4M3), meta(rows, dtype=torch.float32)


FACTOR: Final = meta(1, dtype=torch.float32)
ROWS: Final = meta(8, WIDTH)
PICTURES: Final = meta(8, 4, 4, WIDTH)
CALLS: Final[dict[str, tuple[Callable[[Tensor], object], Tensor]]] = {
    "convolution": (
        lambda x: convolution_fp8_triton(x.to(E4M3), *weights(WIDTH, 9 * WIDTH), x[:, 0, 0].contiguous(), x, 1),
        PICTURES,
    ),
    "linear": (lambda x: linear_fp8_triton(x.to(E4M3), *weights(WIDTH, WIDTH), ROWS[0], x), ROWS),
    "geglu": (lambda x: geglu_triton(x, meta(2 * WIDTH, WIDTH), meta(2 * WIDTH)), ROWS),
    "geglu_fp8": (
        lambda x: geglu_fp8_triton(x.to(E4M3), *weights(2 * WIDTH, WIDTH), meta(2 * WIDTH), FACTOR),
        ROWS,
    ),
    "add_layer_norm": (lambda x: add_layer_norm_triton(x, x + 1, ROWS[0], ROWS[0], 1e-5), ROWS),
    "group_norm": (lambda x: group_norm_triton(x, ROWS[0], ROWS[0], 32, 1e-5, True, FACTOR, False), PICTURES),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_size_is_left_out(name: str) -> None:
    call, x = CALLS[name]

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> object:
            return call(x)

    sizes = torch.export.Dim("B", min=2, max=2 * WIDTH)
    program = torch.export.export(Calling(), (x,), dynamic_shapes=({0: sizes},), strict=False)
    (found,) = program.range_constraints.values()
    assert (int(found.lower), int(found.upper)) == (2, 2 * WIDTH)
