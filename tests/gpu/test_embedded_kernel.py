"""The kernel as a TensorRT plugin embeds it: its PTX with the declared arguments, through the CUDA driver API."""

import ctypes
from dataclasses import replace

import pytest
import torch

from tests.kernels.grca_cases import TOLERANCE, Case, error, inputs, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytest.importorskip("triton", reason="needs Triton")
driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

if torch.cuda.is_available():
    from storyadapter.kernels.grca.aot import EmbeddedKernel, compile_kernel
    from tests.kernels.assembling import assemble


def _checked(result):
    assert result[0] == driver.CUresult.CUDA_SUCCESS, result[0]
    return result[1] if len(result) == 2 else result[1:]


def launch(kernel: "EmbeddedKernel", function, arguments: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    """One launch with exactly the arguments, grid and block that the plugin declares."""
    q, text_kv, _, ref_kv, _, _ = arguments
    tensors = dict(zip(("q", "text_kv", "text_row", "ref_kv", "ref_row", "ref_length"), arguments, strict=True))
    tensors["out"] = out
    of_name = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    of_name |= kernel.integers(q.shape[1], ref_kv.shape[2], text_kv.shape[2])
    values = tuple(of_name[argument.name] for argument in kernel.arguments)
    types = tuple(ctypes.c_int32 if argument.type == "i32" else ctypes.c_void_p for argument in kernel.arguments)
    grid = kernel.grid(q.shape[0], q.shape[1])
    stream = torch.cuda.current_stream().cuda_stream
    _checked(driver.cuLaunchKernel(function, *grid, *kernel.block, kernel.shared_bytes, stream, (values, types), 0))


@pytest.mark.parametrize("heads", [10, 20])
@pytest.mark.parametrize("form", ["ptx", "cubin"])
@pytest.mark.parametrize(("compiled_for", "texts"), [(77, (77,)), (None, (77, 154, 231))])
def test_declared_launch_agrees_with_the_reference(
    heads: int, form: str, compiled_for: int | None, texts: tuple[int, ...]
) -> None:
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    kernel = compile_kernel(10 * major + minor, heads, 64, "fp16", compiled_for)
    assert kernel.shared_bytes <= 48 * 1024
    image = kernel.ptx.encode() + b"\0" if form == "ptx" else assemble(kernel.ptx, 10 * major + minor)
    module = _checked(driver.cuModuleLoadData(image))
    function = _checked(driver.cuModuleGetFunction(module, kernel.entry.encode()))
    cases = (
        Case(16, 1024, heads, 64, 77, 64, (4, 64)),
        Case(2, 4096, heads, 64, 77, 400, (4, 400)),
        Case(3, 100, heads, 64, 77, 13, (13, 1), poison=True),
    )
    for case in (replace(case, text_tokens=text) for case in cases for text in texts):
        arguments = tuple(tensor.contiguous() for tensor in inputs(case, torch.float16, "cuda"))
        out = torch.full_like(arguments[0], float("nan"))
        launch(kernel, function, arguments, out)
        clean = (*arguments[:3], arguments[3].nan_to_num(0.0), *arguments[4:])
        assert error(out, reference(clean)) < TOLERANCE[torch.float16]
    _checked(driver.cuModuleUnload(module))
