"""ONNX export of the contract's networks, and the check of what was exported."""

from typing import Final

OPSET: Final = 23  # of the standard operators in every exported network
# What shapes an exported file.
SOURCES: Final = (
    "storyadapter.export.grca_node",
    "storyadapter.export.onnx_export",
    "storyadapter.export.quantized_nodes",
    "storyadapter.model",
    "storyadapter.quantization",
)


def onnx_name(network: str) -> str:
    """File name of an exported network; its weights lie beside it under this name plus `.data`."""
    return f"{network}.onnx"
