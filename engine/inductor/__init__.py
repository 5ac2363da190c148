"""Backend `inductor`: AOTInductor packages of the contract's networks, for CUDA GPUs with PyTorch and Triton alone.

On a machine without a GPU the same code compiles for the CPU, with PyTorch's own operators in the kernels' places.
"""

from typing import Final

BUILD_VERSION: Final = 4  # raised when what a build makes changes while all else stays the same


def package_name(network: str) -> str:
    """File name of a compiled network."""
    return f"{network}.pt2"


def weights_name(network: str) -> str:
    """File name of its weights, once for all shapes."""
    return f"{network}.safetensors"
