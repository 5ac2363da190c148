"""The operators that a compiler doesn't make as fast as a kernel written for them, by device."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from storyadapter.model.grca import grca
from storyadapter.quantization.layers import E4M3, LARGEST, to_e4m3


class Operators:
    """What the denoiser's blocks are made of besides a compiler's own operators: here PyTorch's. From `group_norm` on,
    in fp8 alone; the VAE's blocks have `group_norm` in any precision. Those without a text here compute what the Triton
    kernels of their names do."""

    @staticmethod
    def grca(
        q: Tensor,
        text_kv: Tensor,
        text_row: Tensor,
        ref_kv: Tensor,
        ref_row: Tensor,
        ref_length: Tensor,
        factor: Tensor | None,
    ) -> Tensor:
        out = grca(q, text_kv, text_row, ref_kv, ref_row, ref_length)
        return out if factor is None else to_e4m3(out, factor)

    @staticmethod
    def add_layer_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, fp8: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum of x and residual [M, C], and its layer norm, which is e4m3 with fp8."""
        total = x + residual
        normed = functional.layer_norm(total, (total.shape[-1],), weight, bias, eps)
        return total, normed.clamp(-LARGEST, LARGEST).to(E4M3) if fp8 else normed

    @staticmethod
    def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """value · gelu(gate) [M, N] from x [M, K], weight [2·N, K], bias [2·N], in the operator's own order of rows."""
        value, gate = functional.linear(x, weight, bias).chunk(2, dim=-1)
        return value * functional.gelu(gate)

    @staticmethod
    def arrange_geglu(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """weight [2·N, K] and bias [2·N], values before gates → the same in the operator's own order of rows."""
        return weight, bias

    @staticmethod
    def group_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        factor: Tensor | None,
        tokens: bool,
    ) -> Tensor:
        out = functional.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps).permute(0, 2, 3, 1)
        out = functional.silu(out) if silu else out
        out = out if factor is None else to_e4m3(out, factor)
        return out.flatten(0, 2) if tokens else out.contiguous()

    @staticmethod
    def convolution_fp8(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int
    ) -> Tensor:
        window = weight.float().unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        out = functional.conv2d(x.float().permute(0, 3, 1, 2), window, stride=stride, padding=1).permute(0, 2, 3, 1)
        out = out * scale + (shift if shift.dim() == 1 else shift[:, None, None])
        return (out if residual is None else out + residual).to(shift.dtype)

    @staticmethod
    def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        out = functional.linear(x.float(), weight.float()) * scale + shift
        return (out if residual is None else out + residual).to(shift.dtype)

    @staticmethod
    def geglu_fp8(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        value, gate = (functional.linear(x.float(), weight.float()) * scale + shift).chunk(2, dim=-1)
        return to_e4m3(value * functional.gelu(gate), factor)


PLAIN: Final = Operators()


def operators_for(device: torch.device) -> Operators:
    """The project's Triton kernels on a CUDA device, PyTorch's operators elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from storyadapter.kernels.geglu import geglu_triton, interleave_geglu
    from storyadapter.kernels.grca.launch import grca_triton
    from storyadapter.kernels.group_norm import group_norm_triton
    from storyadapter.kernels.layer_norm import add_layer_norm_triton
    from storyadapter.kernels.products_fp8 import convolution_fp8_triton, geglu_fp8_triton, linear_fp8_triton

    class Kernels(Operators):
        grca = staticmethod(grca_triton)
        add_layer_norm = staticmethod(add_layer_norm_triton)
        geglu = staticmethod(geglu_triton)
        arrange_geglu = staticmethod(interleave_geglu)
        group_norm = staticmethod(group_norm_triton)
        convolution_fp8 = staticmethod(convolution_fp8_triton)
        linear_fp8 = staticmethod(linear_fp8_triton)
        geglu_fp8 = staticmethod(geglu_fp8_triton)

    return Kernels()
