"""ONNX export of the contract's networks, and the check of what was exported."""

from typing import Final

OPSET: Final = 23  # of the standard operators in every exported network
EXPORT_VERSION: Final = 1  # raised when what an export computes changes while all else stays the same


def export_recipe() -> tuple[tuple[str, str], ...]:
    """What in this version of the program decides what an exported file holds, name and value."""
    return ("opset", str(OPSET)), ("export", str(EXPORT_VERSION))


def onnx_name(network: str) -> str:
    """File name of an exported network; its weights lie beside it under this name plus `.data`."""
    return f"{network}.onnx"
