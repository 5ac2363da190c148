"""Engines of the backend `tensorrt`: load, bind, enqueue.

Needs PyTorch, the standard library and the TensorRT module; of this project only what needs no more than that. A call
doesn't wait for the GPU: it is put on a stream that the engines share, ordered with the caller's by events.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.engine.backend import OpenRequest
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.tensorrt import PROFILES, TENSORRT_NAMES, engine_name, runtime_cache_name
from storyadapter.engine.tensorrt.library import choose_library, gpu_target
from storyadapter.method.errors import EngineMismatchError, RunError
from storyadapter.model.contract import NetworkSpec, Range, size_of
from storyadapter.model.networks import Networks, check_inputs
from storyadapter.model.numerics import Precision
from storyadapter.output.files import write_whole

SHAPES_AT_MOST: Final = 8  # contexts of one network that are kept, one per (B, P, R, h, w) that occurred
GRAPHS_AT_MOST: Final = 8  # CUDA graphs of one context
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What the networks of one model share: the GPU, its stream, and the scratch memory, as they never run at once."""

    device: torch.device
    stream: torch.cuda.Stream
    scratch: Tensor  # [bytes] uint8


@dataclass(frozen=True)
class _Ready:
    """An execution context whose shapes are set, and the graphs captured from it."""

    context: Any
    outputs: dict[str, Tensor]
    graphs: GraphStepRunner


class TensorRTNetwork:
    """One engine, called by names; see `storyadapter.model.networks.Network`.

    Inputs are read where they lie. Outputs lie in memory of the network's own, that its next call writes again.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        engine: Any,
        trt: ModuleType,
        profiles: Sequence[Mapping[str, Range]],
        shared: Device,
        *,
        precision: Precision,
        runtime_cache: Path | None,
    ) -> None:
        self.spec = spec
        self.precision: Precision = precision
        self._engine = engine
        self._trt = trt
        self._shared = shared
        self._profiles = profiles
        self._letters = profiles[0]  # it holds all others
        self._config: Any = None
        self._cache: Any = None
        self._cache_path = runtime_cache
        self.runtime_cache_was_read = False
        if runtime_cache is not None:
            self._open_runtime_cache(runtime_cache)
        most = {letter: allowed.maximum for letter, allowed in self._letters.items()}
        self._buffers = {
            tensor.name: torch.empty(
                math.prod(size_of(dim, most) for dim in tensor.shape) * self._dtype(tensor.name).itemsize,
                dtype=torch.uint8,
                device=shared.device,
            )
            for tensor in spec.outputs
        }
        self._ready: OrderedDict[tuple[tuple[str, int], ...], _Ready] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            ValueError: before anything is put on the GPU: a name, shape, dtype, device or range that doesn't fit.
            RunError: TensorRT refused.
        """
        shared = self._shared
        values = check_inputs(self.spec, inputs, precision=self.precision, device=shared.device, letters=self._letters)
        current = torch.cuda.current_stream(shared.device)
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            key = tuple(sorted(values.items()))
            fresh = key not in self._ready
            if fresh:
                while len(self._ready) >= SHAPES_AT_MOST:  # those that were used the longest time ago go first
                    shared.stream.synchronize()  # they may still be running
                    self._ready.popitem(last=False)
                self._ready[key] = self._new_context(values)
            self._ready.move_to_end(key)
            ready = self._ready[key]
            addresses = tuple(inputs[tensor.name].data_ptr() for tensor in self.spec.inputs)
            ready.graphs(addresses, lambda: self._enqueue(ready.context, inputs))
        current.wait_stream(shared.stream)
        if fresh:
            self._save_runtime_cache()
        return ready.outputs

    @property
    def replays(self) -> int:
        """How often a captured graph was replayed, of the shapes that are kept."""
        return sum(ready.graphs.replays for ready in self._ready.values())

    def _enqueue(self, context: Any, inputs: Mapping[str, Tensor]) -> None:
        for tensor in self.spec.inputs:
            context.set_tensor_address(tensor.name, inputs[tensor.name].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(self._shared.device).cuda_stream):
            raise RunError(f"{self.spec.name}: TensorRT refused to run the engine; its log says why")

    def _new_context(self, values: Mapping[str, int]) -> _Ready:
        """A context with its shapes set. Each shape has its own, so that a captured graph never meets another one."""
        context = self._engine.create_execution_context(
            self._config or self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise RunError(f"{self.spec.name}: TensorRT gave no execution context; its log says why")
        profile = profile_for(self._profiles, values)
        if profile:
            context.set_optimization_profile_async(profile, self._shared.stream.cuda_stream)
        context.set_device_memory(self._shared.scratch.data_ptr(), self._shared.scratch.numel())
        for tensor in self.spec.inputs:
            shape = tuple(size_of(dim, values) for dim in tensor.shape)
            if not context.set_input_shape(tensor.name, shape):
                raise RunError(f"{self.spec.name}: TensorRT refused {tensor.name} of shape {list(shape)}")
        outputs = {}
        for tensor in self.spec.outputs:
            shape = tuple(size_of(dim, values) for dim in tensor.shape)
            dtype = self._dtype(tensor.name)
            buffer = self._buffers[tensor.name][: math.prod(shape) * dtype.itemsize]
            outputs[tensor.name] = buffer.view(dtype).view(shape)
            context.set_tensor_address(tensor.name, buffer.data_ptr())
        return _Ready(context, outputs, GraphStepRunner(GRAPHS_AT_MOST))

    def _dtype(self, name: str) -> torch.dtype:
        tensor = next(t for t in (*self.spec.inputs, *self.spec.outputs) if t.name == name)
        return getattr(torch, tensor.dtype_name(self.precision))

    def _open_runtime_cache(self, path: Path) -> None:
        """TensorRT-RTX compiles its kernels when a context is made; what it compiled is kept beside the engine."""
        self._config = self._engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # by default another kernel runs until those for these shapes are compiled beside it: the same call would give
        # other bytes later, and a graph that is captured meanwhile would keep the slower kernels
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._config.dynamic_shapes_kernel_specialization_strategy = eager
        self._cache = self._config.create_runtime_cache()
        if path.is_file():
            self.runtime_cache_was_read = bool(self._cache.deserialize(path.read_bytes()))
            if not self.runtime_cache_was_read:
                _LOG.info("%s is of another GPU, driver or version; it is made anew", path)
        self._config.set_runtime_cache(self._cache)

    def _save_runtime_cache(self) -> None:
        """Keep what TensorRT-RTX compiled so far; a folder that can't be written is no error."""
        if self._cache is None or self._cache_path is None:
            return
        try:
            write_whole(self._cache_path, bytes(self._cache.serialize()))
        except OSError as error:
            _LOG.info("%s can't be written: %s", self._cache_path, error.strerror)


def open_tensorrt(request: OpenRequest) -> Networks:
    """Open the networks of an engine on the current GPU.

    Raises:
        EngineMismatchError: the engine isn't the contract's.
        RunError: TensorRT can't load an engine.
    """
    folder, numerics = request.stored.folder, request.numerics
    library, _ = choose_library((), gpu_target())  # of the version that built them, or the store wouldn't serve them
    trt = library.load()
    device = torch.device("cuda", torch.cuda.current_device())
    logger = _logger(trt)
    runtime = trt.Runtime(logger)

    def load(spec: NetworkSpec) -> tuple[NetworkSpec, Any]:
        engine = runtime.deserialize_cuda_engine((folder / engine_name(spec.name)).read_bytes())
        if engine is None:
            reason = logger.last_error or "no reason told"
            raise RunError(f"{spec.name}: {library.module} can't load the engine: {reason}")
        check_engine(engine, spec, numerics[spec.name])
        return spec, engine

    engines = request.load_each(load)
    scratch = max(engine.device_memory_size_v2 for _, engine in engines.values())
    shared = Device(device, torch.cuda.Stream(device), torch.empty(max(scratch, 1), dtype=torch.uint8, device=device))
    profiles = read_profiles(request.stored.details)
    networks = {
        name: TensorRTNetwork(
            spec,
            engine,
            trt,
            profiles[name],
            shared,
            precision=numerics[name],
            runtime_cache=None if library.has_plugins else folder / runtime_cache_name(name),  # TensorRT-RTX keeps one
        )
        for name, (spec, engine) in engines.items()
    }
    return Networks(
        networks,
        geometry=request.checkpoint.geometry,
        backend="tensorrt",
        device=device,
        numerics=numerics,
        letters=request.letters,
    )


def read_profiles(details: Mapping[str, Any]) -> dict[str, list[dict[str, Range]]]:
    """By network, the ranges of its letters in each optimization profile, from what a build's manifest says."""
    return {
        name: [{letter: Range(*bounds) for letter, bounds in profile.items()} for profile in profiles]
        for name, profiles in details[PROFILES].items()
    }


def profile_for(profiles: Sequence[Mapping[str, Range]], values: Mapping[str, int]) -> int:
    """The optimization profile for these values: one made for exactly this size if there is one, else the first."""
    single = range(len(profiles) - 1, 0, -1)
    return next((n for n in single if all(values[name] in allowed for name, allowed in profiles[n].items())), 0)


def check_engine(engine: Any, spec: NetworkSpec, precision: Precision) -> None:
    """Raises EngineMismatchError unless an engine's inputs and outputs are the contract's, by name and dtype."""
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if found != expected:
        raise EngineMismatchError(f"{spec.name}: the engine has {sorted(found)}; the contract has {sorted(expected)}")
    for tensor in (*spec.inputs, *spec.outputs):
        dtype = engine.get_tensor_dtype(tensor.name).name
        wanted = TENSORRT_NAMES[tensor.dtype_name(precision)]
        if dtype != wanted:
            raise EngineMismatchError(f"{spec.name}: {tensor.name} is {dtype} in the engine; expected {wanted}")


def _logger(trt: ModuleType) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """TensorRT's messages as Python's: its errors and warnings, and the last error for an exception's text."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.last_error = " ".join(message.split())
                _LOG.error("%s", message)
            elif level == severity.WARNING:
                _LOG.warning("%s", message)

    return Logger()
