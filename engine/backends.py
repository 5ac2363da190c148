"""All backends, and which of them is the default here. Imports nothing heavy until it is asked."""

from typing import TYPE_CHECKING, Final

from storyadapter.engine.backend import Backend
from storyadapter.engine.eager.backend import BACKEND as EAGER
from storyadapter.engine.inductor.backend import BACKEND as INDUCTOR
from storyadapter.engine.onnxruntime.backend import BACKEND as ONNXRUNTIME
from storyadapter.engine.tensorrt.backend import BACKEND as TENSORRT
from storyadapter.method.errors import UnavailableError

if TYPE_CHECKING:
    import torch

BACKENDS: Final[dict[str, Backend]] = {backend.name: backend for backend in (EAGER, INDUCTOR, ONNXRUNTIME, TENSORRT)}
AUTO: Final = "auto"


def find_backend(
    name: str, device: "torch.device | None" = None, *, precision: str = AUTO, vae_precision: str = AUTO
) -> Backend:
    """The backend of this name; for "auto" the default of this machine, or of one of its devices.

    Args:
        precision, vae_precision: as of `storyadapter.open`; "auto" takes a backend that has them.

    Raises:
        UnavailableError: no backend has this name.
    """
    if name == AUTO:
        serving = [
            backend
            for backend in BACKENDS.values()
            if (device is None or backend.runs_on(device))
            and precision in (AUTO, *backend.precisions, *backend.number_formats)
            and vae_precision in (AUTO, *backend.vae_precisions, *backend.vae_number_formats)
        ]
        return max(serving, key=lambda backend: backend.rank())
    if name not in BACKENDS:
        raise UnavailableError(f"unknown backend {name!r}", expected=f"one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
