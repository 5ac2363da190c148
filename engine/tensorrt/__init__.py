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
