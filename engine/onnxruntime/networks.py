"""The contract's networks in ONNX Runtime, on the CPU: exported and compared with eager, opened, and run."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException
from torch import Tensor

from storyadapter.engine.backend import EngineRequest, OpenRequest
from storyadapter.export import onnx_name
from storyadapter.export.verify import open_session
from storyadapter.method.memory_errors import is_out_of_memory
from storyadapter.model.contract import NetworkSpec, Range, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.networks import Networks, check_inputs
from storyadapter.model.numerics import Precision

DEVICE = torch.device("cpu")


class OnnxRuntimeNetwork:
    """A network of the contract as an ONNX Runtime session."""

    def __init__(self, spec: NetworkSpec, path: Path, *, precision: Precision, letters: Mapping[str, Range]) -> None:
        self.spec = spec
        self.precision: Precision = precision
        self.letters = letters
        self.session = open_session(path)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `storyadapter.model.networks.Network`."""
        check_inputs(self.spec, inputs, precision=self.precision, device=DEVICE, letters=self.letters)
        names = [tensor.name for tensor in self.spec.outputs]
        with as_memory_error():
            outputs = self.session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}


@contextmanager
def as_memory_error() -> Iterator[None]:
    """Inside, an error of ONNX Runtime for lack of memory is a `MemoryError`; it has no class of its own for it."""
    try:
        yield
    except (Fail, RuntimeException) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(str(error)) from error


def open_onnxruntime(request: OpenRequest) -> Networks:
    """Open the exported networks of an engine."""
    numerics, letters = request.numerics, request.letters

    def load(spec: NetworkSpec) -> OnnxRuntimeNetwork:
        path = request.stored.folder / onnx_name(spec.name)
        return OnnxRuntimeNetwork(spec, path, precision=numerics[spec.name], letters=letters)

    return Networks(
        request.load_each(load),
        geometry=request.checkpoint.geometry,
        backend="onnxruntime",
        device=DEVICE,
        numerics=numerics,
        letters=letters,
    )


def build_onnx(request: EngineRequest) -> dict[str, float]:
    """Export the networks, one after the other; gives the relative error of each against eager.

    Raises:
        EngineBuildError: a file doesn't compute what eager computes.
    """
    from storyadapter.export.onnx_export import export_compared  # most of a second, which a run needn't wait for

    specs, numerics = network_specs(request.checkpoint.geometry), request.numerics
    errors: dict[str, float] = {}
    modules = iterate_modules(request.checkpoint, numerics, grca)
    while True:
        request.on_stage("", "loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            return errors
        told = functools.partial(request.on_stage, name)
        _, errors[name] = export_compared(specs[name], module, request.letters, numerics[name], request.folder, told)
