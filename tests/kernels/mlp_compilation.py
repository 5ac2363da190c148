"""Helpers of the tests: kernels compiled for GPUs that are not here."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for(
    kernel: Any,
    constants: dict[str, Any],
    capability: int,
    element_type: str,
    options: dict[str, int],
    descriptors: dict[str, tuple[int, int]] | None = None,
) -> Any:
    """Triton's compiled kernel; `descriptors`: blocks of the arguments that are tensor descriptors."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "rows":
            signature[name] = "i32"
        elif descriptors and name in descriptors:
            signature[name] = f"tensordesc<{element_type}{list(descriptors[name])}>"
        else:
            signature[name] = f"*{element_type}"
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        {(index(name),): value for name, value in constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found.group(1)), int(found.group(2))


class AbsentDriver:
    """A driver for a GPU that is not here: all that PyTorch asks of one to read a kernel's intermediate form."""

    def get_current_target(self) -> GPUTarget:
        """Compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)


def captured_graph(layer: Callable[..., torch.Tensor], arguments: Sequence[torch.Tensor]) -> torch.fx.Graph:
    """What `torch.compile` hands to its code generator, with rows free; nothing is run."""
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(module.graph)
        return lambda *_: [torch.zeros(1)]

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(*arguments)
    assert len(graphs) == 1
    return graphs[0]
