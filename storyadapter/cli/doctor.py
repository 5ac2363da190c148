"""`storyadapter-trt doctor`: what this machine can run, and why not the rest."""

import platform

import psutil
import torch

import storyadapter
from storyadapter.cli.engines import engine_table
from storyadapter.cli.options import typed
from storyadapter.cli.reporting import print_result
from storyadapter.engine.backend import installed_version
from storyadapter.engine.backends import AUTO, BACKENDS, find_backend
from storyadapter.engine.gpu import driver_version
from storyadapter.engine.store import EngineStore


def doctor() -> int:
    """Print GPU, driver, versions, backends and engines; returns 0 as long as some backend can serve."""
    memory = psutil.virtual_memory().total / 2**30
    lines = [f"machine    {platform.machine()}, {psutil.cpu_count(logical=False)} cores, {memory:.0f} GiB memory"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}      {device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability "
                f"{device.major}.{device.minor}, driver {driver_version()}, CUDA {torch.version.cuda}"
            )
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        lines.append(f"GPU        none that PyTorch can use (it is {built})")
    lines.append("versions   " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    usable = []
    for backend in BACKENDS.values():
        reason = backend.why_unavailable() or backend.why_it_cant_run()
        usable += [] if reason else [backend]
        why = backend.why_it_cant_build()
        served = f"can run what was built elsewhere, not build: {typed(why)}" if why else "can serve"
        lines.append(f"backend    {backend.name}: {backend.purpose}; " + (f"NO: {reason}" if reason else served))
    lines += [f"{heading:<10} {text}" for backend in BACKENDS.values() for heading, text in backend.describe()]
    lines.append(f"default    --backend {find_backend(AUTO).name}")
    store = EngineStore()
    lines += [f"engines    {len(store.scan()[0])} in {store.root}", *engine_table(store)]
    print_result("\n".join(lines))
    return 0 if usable else 1


_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton")


def versions(*more: str) -> dict[str, str]:
    """Of this program, Python, and every library that is installed and takes part; `more`: others that are wanted."""
    found = {package: version for package in (*_PACKAGES, *more) if (version := installed_version(package))}
    return {"storyadapter-trt": storyadapter.__version__, "python": platform.python_version(), **found}
