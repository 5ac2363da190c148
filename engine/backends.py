"""Which backends there are, and whether each can serve on this machine. Imports nothing heavy until it is asked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from storyadapter.method.errors import Field, UnavailableError
from storyadapter.model.numerics import PRECISIONS, Numerics, Precision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Backend:
    """A way to run the seven networks.

    Attributes:
        name: as a user types it.
        builds: whether `build` makes an artefact that `run` needs.
        packages: what must be installed to run.
        build_packages: what must be installed besides to build.
        extra: installs both.
        one_of: of these packages, one must be installed to run or to build; with what each is for. The extra of the
            same name installs it and both of the others.
        precisions: those it can serve.
        vae_precisions: those in which it can run the VAE, which needn't have the precision of the other networks.
        purpose: for help texts and `doctor`.
    """

    name: str
    builds: bool
    packages: tuple[str, ...]
    extra: str | None
    precisions: tuple[Precision, ...]
    vae_precisions: tuple[Precision, ...]
    purpose: str
    one_of: tuple[tuple[str, str], ...] = ()
    build_packages: tuple[str, ...] = ()


BACKENDS: Final = {
    backend.name: backend
    for backend in (
        Backend("eager", False, ("torch",), None, PRECISIONS, PRECISIONS, "plain PyTorch on CPU or GPU: the reference"),
        Backend(
            "inductor",
            True,
            ("torch",),
            None,
            PRECISIONS,
            PRECISIONS,
            "compiled by PyTorch with the fused kernels: the default with a CUDA GPU",
        ),
        Backend(
            "onnxruntime",
            True,
            ("onnx", "onnxruntime", "onnxscript"),
            "onnxruntime",
            ("fp32", "fp16"),
            ("fp32", "fp16"),
            "ONNX on the CPU: the default without a GPU",
        ),
        Backend(
            "tensorrt",
            True,
            (),
            "onnxruntime",
            ("fp16", "bf16"),
            PRECISIONS,
            "engines of TensorRT or TensorRT-RTX, for NVIDIA GPUs",
            one_of=(
                ("tensorrt-rtx", "an RTX GPU, or to build on any machine"),
                ("tensorrt", "a data-centre GPU"),
            ),
            build_packages=("onnx", "onnxruntime", "onnxscript"),
        ),
    )
}
AUTO: Final = "auto"


def why_unavailable(name: str, *, to_build: bool = False) -> str | None:
    """Why a backend can't serve here, in words; None if it can. Asks for packages, not a GPU.

    Raises:
        UnavailableError: no backend has this name.
    """
    if name not in BACKENDS:
        raise UnavailableError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    needed = backend.packages + (backend.build_packages if to_build else ())
    missing = [package for package in needed if installed_version(package) is None]
    extras = [(backend.extra, "")]
    if backend.one_of and all(installed_version(package) is None for package, _ in backend.one_of):
        missing.insert(0, " or ".join(package for package, _ in backend.one_of))
        extras = [(package, f" for {purpose}") for package, purpose in backend.one_of]
    if missing:
        ways = "; ".join(f"pip install 'storyadapter-trt[{extra}]'{purpose}" for extra, purpose in extras)
        return f"{' and '.join(missing)} not installed; type: {ways}"
    return None


def check_available(name: str, numerics: Numerics, *, to_build: bool = False) -> None:
    """Raises UnavailableError, with the reason, if a backend can't serve here in these numerics."""
    refused = f"backend {name} can't serve here: "
    if reason := why_unavailable(name, to_build=to_build):
        raise UnavailableError(refused + reason)
    backend = BACKENDS[name]
    for field, what, asked, served in (
        ("precision", "", numerics.precision, backend.precisions),
        ("vae_precision", " the VAE", numerics["vae_decoder"], backend.vae_precisions),
    ):
        if asked not in served:
            expected = (Field(field), f" {' or '.join(served)}")
            raise UnavailableError(f"{refused}it can't run{what} in {asked}", expected=expected, field=field)


def choose_backend() -> str:
    """The default of this machine: `inductor` with a CUDA GPU, else `onnxruntime` where installed, else `eager`."""
    import torch

    if torch.cuda.is_available():
        return "inductor"
    return "onnxruntime" if why_unavailable("onnxruntime") is None else "eager"


def choose_precision(backend: str) -> Precision:
    """The default precision: fp16 on a CUDA GPU (`tensorrt` builds for one, wherever it is built), fp32 on a CPU."""
    import torch

    on_gpu = backend == "tensorrt" or (backend != "onnxruntime" and torch.cuda.is_available())
    return "fp16" if on_gpu else "fp32"


def default_device() -> "torch.device":
    """Where PyTorch's own backends run: the CUDA GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    from importlib.metadata import PackageNotFoundError, version  # a tenth of the time that a help text takes

    try:
        return version(package)
    except PackageNotFoundError:
        return None
