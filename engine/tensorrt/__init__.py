"""Backend `tensorrt`: one code path for TensorRT and TensorRT-RTX, from ONNX files to engines and their sessions."""

from typing import Final

# What shapes an engine beside the export.
SOURCES: Final = (
    "storyadapter.engine.tensorrt.builder",
    "storyadapter.engine.tensorrt.options",
    "storyadapter.engine.tensorrt.plugin",
    "storyadapter.engine.tensorrt.plugin_launch",
    "storyadapter.engine.tensorrt.worker",
    "storyadapter.kernels",
)
# The contract's dtypes as TensorRT names them.
TENSORRT_NAMES: Final = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
PROFILES: Final = "profiles"  # of a build's details: by network, its letters' ranges per profile


def engine_name(network: str) -> str:
    """File name of a built network."""
    return f"{network}.engine"


def runtime_cache_name(network: str) -> str:
    """File name of what TensorRT-RTX compiled of a network when it was run."""
    return f"{network}.runtime-cache"


def layers_name(network: str) -> str:
    """File name of a network's layer list."""
    return f"{network}.layers"
