"""The fused GRCA kernel as a plugin of TensorRT, embedded ahead of time: an engine with it needs no Python, no Triton.

Importing this module registers the plugin `storyadapter::GlobalReferenceCrossAttention` in this process; needs
`tensorrt` (TensorRT-RTX knows no plugins), Triton and the GPU to build for. The parser finds it by the node's name and
its attribute `plugin_namespace`. TensorRT reads the annotations below when they are registered: they must stay values,
not strings.
"""

import tensorrt.plugin as trtp

from storyadapter.engine.tensorrt.library import gpu_target
from storyadapter.engine.tensorrt.plugin_launch import PluginError, plan_launch
from storyadapter.export.grca_node import DOMAIN, OP_TYPE

PLUGIN_ID = f"{DOMAIN}::{OP_TYPE}"


@trtp.register(PLUGIN_ID)
def describe(
    q: trtp.TensorDesc,
    text_kv: trtp.TensorDesc,
    text_row: trtp.TensorDesc,
    ref_kv: trtp.TensorDesc,
    ref_row: trtp.TensorDesc,
    ref_length: trtp.TensorDesc,
) -> trtp.TensorDesc:
    """The result has q's shape and type: [B, S, H, D]."""
    return q.like()


@trtp.autotune(PLUGIN_ID)
def offer(
    q: trtp.TensorDesc,
    text_kv: trtp.TensorDesc,
    text_row: trtp.TensorDesc,
    ref_kv: trtp.TensorDesc,
    ref_row: trtp.TensorDesc,
    ref_length: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """fp16 or bf16 throughout, row tables int32, everything packed row by row; one tactic."""
    half = "FP16|BF16"
    types = (half, half, "INT32", half, "INT32", "INT32", half)
    return [trtp.AutoTuneCombination(", ".join(types), "LINEAR")]


@trtp.aot_impl(PLUGIN_ID)
def embed(
    q: trtp.TensorDesc,
    text_kv: trtp.TensorDesc,
    text_row: trtp.TensorDesc,
    ref_kv: trtp.TensorDesc,
    ref_row: trtp.TensorDesc,
    ref_length: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """The kernel's PTX with its launch, for the layer whose shapes these are."""
    target = gpu_target()
    if target is None:
        raise PluginError("there is no GPU to embed the kernel for")
    letters = {
        "B": q.shape_expr[0],
        "S": q.shape_expr[1],
        "R": ref_kv.shape_expr[2],
        "H": _number(q, 2),
        "D": _number(q, 3),
        "T": _number(text_kv, 2),
    }
    launch = plan_launch(int(target[2:]), q.dtype.name, letters)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x, parameters.block_y, parameters.block_z = launch.block
    parameters.shared_mem = launch.shared_bytes
    integers = trtp.SymIntExprs(len(launch.integers))
    for index, value in enumerate(launch.integers):
        integers[index] = trtp.SymInt32(value)
    return launch.kernel.entry, launch.kernel.ptx, parameters, integers


def _number(tensor: trtp.TensorDesc, axis: int) -> int | trtp.ShapeExpr:
    """A dimension that is known when the engine is built; its symbol where it isn't."""
    symbol = tensor.shape_expr[axis]
    return symbol.constant_value() if symbol.is_constant else symbol
