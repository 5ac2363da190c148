"""Backend `inductor`: AOTInductor packages of the contract's networks, for CUDA GPUs with PyTorch and Triton alone.

On a machine without a GPU the same code compiles for the CPU, with PyTorch's own operators in the kernels' places.
"""

from typing import Final

# What shapes the compiled code.
SOURCES: Final = (
    "storyadapter.engine.inductor.compilation",
    "storyadapter.engine.inductor.fusion",
    "storyadapter.engine.inductor.launch_analysis",
    "storyadapter.engine.inductor.operators",
    "storyadapter.engine.inductor.picture_fusion",
    "storyadapter.engine.inductor.products",
    "storyadapter.engine.inductor.shapes",
    "storyadapter.engine.inductor.vae_fusion",
    "storyadapter.kernels",
    "storyadapter.model",
    "storyadapter.quantization",
)


def package_name(network: str) -> str:
    """File name of a compiled network."""
    return f"{network}.pt2"


def constants_name(network: str) -> str:
    """File name of what its code reads besides a model's weights: tensors that the code itself holds, if any."""
    return f"{network}.constants.safetensors"
