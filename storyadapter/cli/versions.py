"""The versions that decide what a run computes."""

import platform

import storyadapter
from storyadapter.engine.backend import installed_version

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")


def versions(*more: str) -> dict[str, str]:
    """Of this program, Python, and every library that is installed and takes part; `more`: others that are wanted."""
    found = {package: version for package in (*_PACKAGES, *more) if (version := installed_version(package))}
    return {"storyadapter-trt": storyadapter.__version__, "python": platform.python_version(), **found}
