"""The plugin's launch through the CUDA driver API: right, and as fast as Triton's own launch of the same variant."""

import ctypes
import statistics
from collections.abc import Callable

import pytest
import torch

from tests.kernels.grca_cases import TOLERANCE, Case, error, inputs, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytest.importorskip("triton", reason="needs Triton")
driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

CASE = Case(16, 4096, 10, 64, 77, 400, (4, 400))
REPEATS = 30
CALLS = 20


def test_the_plugins_launch_is_right_and_as_fast_as_tritons() -> None:
    from storyadapter.engine.tensorrt.plugin_launch import plan_launch
    from storyadapter.kernels.grca.kernel import grca_kernel
    from storyadapter.kernels.grca.launch import launch_arguments

    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    arguments = tuple(tensor.contiguous() for tensor in inputs(CASE, torch.float16, "cuda"))
    q, text_kv, _, ref_kv, _, _ = arguments
    letters = {"B": q.shape[0], "S": q.shape[1], "R": ref_kv.shape[2]}
    letters |= {"H": q.shape[2], "D": q.shape[3], "T": text_kv.shape[2]}
    launch = plan_launch(10 * major + minor, "HALF", letters)
    status, module = driver.cuModuleLoadData(launch.kernel.ptx.encode() + b"\0")
    assert status == driver.CUresult.CUDA_SUCCESS
    status, function = driver.cuModuleGetFunction(module, launch.kernel.entry.encode())
    assert status == driver.CUresult.CUDA_SUCCESS
    out, other = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    values = (*(tensor.data_ptr() for tensor in arguments), *launch.integers, out.data_ptr())
    types = (ctypes.c_void_p,) * 6 + (ctypes.c_int32,) * len(launch.integers) + (ctypes.c_void_p,)

    def embedded() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        (status,) = driver.cuLaunchKernel(
            function, *launch.grid, *launch.block, launch.shared_bytes, stream, (values, types), 0
        )
        assert status == driver.CUresult.CUDA_SUCCESS

    grid, positional, keywords = launch_arguments(*arguments, other, launch.kernel.tiles)

    def tritons() -> None:
        grca_kernel[grid](*positional, **keywords)

    embedded()
    tritons()
    expected = reference(arguments)
    assert error(out, expected) < TOLERANCE[torch.float16]
    assert error(other, expected) < TOLERANCE[torch.float16]
    times: dict[str, list[float]] = {"embedded": [], "triton": []}
    graphs = {"embedded": captured(embedded), "triton": captured(tritons)}
    for _ in range(REPEATS):  # in turn, so that a clock that drifts is the same for both
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    ratio = statistics.median(times["embedded"]) / statistics.median(times["triton"])
    assert 0.97 < ratio < 1.03


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`CALLS` calls in one graph, so that launches of the host aren't measured; replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    return graph
