"""What a package is compiled for and with: it runs only where these are the same."""

import platform
import subprocess
from pathlib import Path

import torch

from storyadapter.engine.backend import installed_version
from storyadapter.method.errors import UnavailableError


def target_architecture(device: torch.device) -> str:
    """ "sm90-x86_64-avx512" for a GPU and its host, "cpu-x86_64-avx512" for a CPU: packages hold programs for the host,
    compiled for the instructions that it has."""
    host = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}-{host}"
    return f"cpu-{host}"


def compiler_versions(device: torch.device) -> str:
    """The versions of what compiles, Triton where it makes the kernels, and of what the compiled modules are made of:
    weights are bound to the code by the names that they have there."""
    names = ("torch", *(("triton",) if device.type == "cuda" else ()), "diffusers", "transformers")
    return " ".join(f"{name} {installed_version(name)}" for name in names)


def check_compilers(device: torch.device) -> None:
    """Find out before a long build whether packages can be made and loaded.

    Raises:
        UnavailableError: no Triton for a GPU; no C++ compiler; or no shared C++ library for it: a package with a static
            one crashes when PyTorch, which brings another, loads it.
    """
    # the whole compiler, which opening an engine can do without
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type == "cuda" and installed_version("triton") is None:
        raise UnavailableError("backend inductor needs Triton to build for a GPU; type: pip install triton")
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UnavailableError(
            "backend inductor needs a C++ compiler to build, and none is there", expected="g++, or CXX naming another"
        ) from error
    asked = subprocess.run([compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=False)
    if not Path(asked.stdout.strip()).exists():
        raise UnavailableError(
            f"{compiler} finds no shared libstdc++.so, and a package with a static one crashes when it is loaded",
            expected="the library beside the compiler, or CXX naming one that has it, such as CXX=/usr/bin/g++",
        )
