"""All backends, and which of them is the default here. Imports nothing heavy until it is asked."""

from typing import Final

from storyadapter.engine.backend import Backend
from storyadapter.engine.eager.backend import BACKEND as EAGER
from storyadapter.engine.inductor.backend import BACKEND as INDUCTOR
from storyadapter.engine.onnxruntime.backend import BACKEND as ONNXRUNTIME
from storyadapter.engine.tensorrt.backend import BACKEND as TENSORRT
from storyadapter.method.errors import UnavailableError

BACKENDS: Final[dict[str, Backend]] = {backend.name: backend for backend in (EAGER, INDUCTOR, ONNXRUNTIME, TENSORRT)}
AUTO: Final = "auto"


def find_backend(name: str) -> Backend:
    """The backend of this name; the default of this machine for "auto".

    Raises:
        UnavailableError: no backend has this name.
    """
    if name == AUTO:
        return max(BACKENDS.values(), key=lambda backend: backend.rank())
    if name not in BACKENDS:
        raise UnavailableError(f"unknown backend {name!r}", expected=f"one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
