"""One network's engine. Built in a process of its own, see `storyadapter.engine.processes`: a build ends at once
wherever it is, the log is this network's alone (TensorRT keeps the first logger of a process for good), and its peak
memory can be told.

Imports the standard library and TensorRT alone (and the plugin's modules where the plugin is embedded).
"""

import importlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from storyadapter.method.errors import EngineBuildError
from storyadapter.output.files import write_whole

_PROGRESS_SECONDS = 0.2
HEADER: Final = "Layers:"  # of the message in which TensorRT's builder lists them, at `ProfilingVerbosity.DETAILED`
_LAYER: Final = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: .*?"
    r"Metadata: (?P<metadata>.*)$"
)
_DATATYPE: Final = re.compile(r"Datatype: (\w+)")
_PRODUCTS: Final = ("gemm", "correlation")
_OPERANDS: Final = {"FP8", "Int8"}  # data types of quantized operands
_NODE: Final = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_FUSED: Final = re.compile(r"mha")  # _gemm_mha_v2 in TensorRT-RTX, fmha_… in TensorRT


@dataclass(frozen=True)
class Layer:
    """One layer of the built engine; `nodes`: ONNX nodes that went into it, `inputs`: the types of what it reads."""

    name: str
    type: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    @property
    def is_quantized_product(self) -> bool:
        """Whether this is a matrix product or a convolution of 8-bit operands."""
        return self.type in _PRODUCTS and not _OPERANDS.isdisjoint(self.inputs)

    @property
    def is_fused_attention(self) -> bool:
        """Whether this is an attention kernel: scores, softmax and values in one."""
        return self.type != "gemm" and _FUSED.search(self.name) is not None


def parse_layers(text: str) -> tuple[Layer, ...]:
    """The layers of the builder's message, as an engine for another GPU can't be opened to ask it.

    Raises:
        ValueError: it holds no layers, or a line of another form.
    """
    layers = []
    for line in text.splitlines():
        if match := _LAYER.match(line):
            nodes, inputs = _NODE.findall(match["metadata"]), _DATATYPE.findall(match["inputs"])
            layers.append(Layer(match["name"], match["type"], tuple(nodes), tuple(inputs)))
        elif line.startswith("Name: "):
            raise ValueError(f"not a layer as TensorRT's builder writes them: {line[:120]}")
    if not layers:
        raise ValueError("the builder's message names no layers")
    return tuple(layers)


@dataclass(frozen=True)
class TensorBounds:
    """An input or output as the contract has it."""

    name: str
    shape: tuple[int, ...]  # -1 where a dimension is dynamic
    dtype: str  # TensorRT's name: "HALF", "BF16", "FLOAT", "INT32"
    # of an input: one (min, opt, max) of shapes per optimization profile
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class NetworkRequest:
    """Everything a build needs; plain data. Of the files, `onnx` is read, the others are written."""

    module: str  # "tensorrt" or "tensorrt_rtx"
    onnx: str
    engine: str
    log: str
    layers: str
    targets: tuple[str, ...]  # architectures for `tensorrt_rtx`; `tensorrt` builds for the GPU that is present
    inputs: tuple[TensorBounds, ...]  # that the parsed network must have, as the outputs
    outputs: tuple[TensorBounds, ...]
    optimization_level: int | None = None  # 0 to 5, None for TensorRT's own default
    workspace_bytes: int | None = None  # the most scratch memory of one layer, None for TensorRT's own default
    timing_cache: str | None = None  # read if it is there, then written; `tensorrt` only
    plugin: bool = False  # register the fused kernel, so that the parser takes it for our node


@dataclass(frozen=True)
class BuildReport:
    """What a build took and gave."""

    seconds: float  # parse, build and write
    parse_seconds: float  # of the ONNX file alone
    peak_memory_bytes: int  # of the building process, the library included; 0 where the system doesn't tell
    engine_bytes: int  # of the file
    layers: int  # of the engine
    fused_attentions: int  # those layers that are an attention in one kernel
    longest_step_seconds: float  # the longest time without a word from the builder
    warnings: int = 0
    quantized_products: int = 0  # those layers that are a product of 8-bit operands


class Refusal(EngineBuildError):
    """TensorRT refused; the text is its own words, with the node's name."""


def build(request: NetworkRequest, tell: Callable[..., None]) -> BuildReport:
    """Parse and build one network, and write the engine, its log and its layer list.

    Args:
        tell: called with `fraction`, how much is built, now and then.

    Raises:
        Refusal: the parser or the builder refused, or the network isn't the contract's.
        OSError: a file can't be written.
    """
    trt = importlib.import_module(request.module)
    started = time.perf_counter()
    with open(request.log, "w", encoding="utf-8") as log_file:
        logger = _logger(trt, log_file)
        if request.plugin:
            importlib.import_module("storyadapter.engine.tensorrt.plugin")  # registers itself
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, network, logger, request)
        parse_seconds = time.perf_counter() - started
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        monitor = _monitor(trt, tell)
        config.progress_monitor = monitor
        _configure(trt, config, request)
        for index in range(len(request.inputs[0].profiles)):
            profile = builder.create_optimization_profile()
            for tensor in request.inputs:
                profile.set_shape(tensor.name, *tensor.profiles[index])
            config.add_optimization_profile(profile)
        cache = _timing_cache(config, request)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise Refusal("; ".join(logger.errors) or "the builder gave no engine and no reason")
        Path(request.layers).write_text(logger.layers, encoding="utf-8")
        with open(request.engine, "wb") as file:
            file.write(engine)
        if cache is not None:
            write_whole(Path(str(request.timing_cache)), bytes(cache.serialize()))
        built = parse_layers(logger.layers)
        return BuildReport(
            seconds=round(time.perf_counter() - started, 3),
            parse_seconds=round(parse_seconds, 3),
            peak_memory_bytes=peak_memory(),
            engine_bytes=engine.nbytes,
            layers=len(built),
            fused_attentions=sum(layer.is_fused_attention for layer in built),
            quantized_products=sum(layer.is_quantized_product for layer in built),
            longest_step_seconds=round(monitor.longest_silence, 3),
            warnings=logger.warnings,
        )


def _parse(trt: ModuleType, network: Any, logger: Any, request: NetworkRequest) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise Refusal(
            "; ".join(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors)
            or "; ".join(logger.errors)
        )
    found_inputs = [network.get_input(index) for index in range(network.num_inputs)]
    found_outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, found, expected in (("input", found_inputs, request.inputs), ("output", found_outputs, request.outputs)):
        seen = [(tensor.name, tuple(tensor.shape), tensor.dtype.name) for tensor in found]
        wanted = [(tensor.name, tensor.shape, tensor.dtype) for tensor in expected]
        if seen != wanted:
            raise Refusal(f"the parsed network's {kind}s are {seen}; the contract's are {wanted}")
    # An attention that no kernel serves (fp32, some head sizes) may be taken apart, instead of ending the build.
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(trt: ModuleType, config: Any, request: NetworkRequest) -> None:
    if request.module == "tensorrt_rtx":
        config.num_compute_capabilities = len(request.targets)
        for index, target in enumerate(request.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)


def _timing_cache(config: Any, request: NetworkRequest) -> Any:
    """The timing cache that the build reads and fills, or None where there is none to keep."""
    if request.timing_cache is None:
        return None
    path = Path(request.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _logger(trt: ModuleType, log_file: Any) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Keeps everything above VERBOSE, and of that the layer list."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings = 0
            self.layers = ""

        def log(self, level: Any, message: str) -> None:
            if level == severity.VERBOSE:
                if message.startswith(HEADER):
                    self.layers = message.removeprefix(HEADER).strip("\n") + "\n"
                return
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)
            self.warnings += level == severity.WARNING
            log_file.write(f"{level.name} {message}\n")

    return Logger()


@dataclass
class _Phase:
    steps: int
    done: int = 0
    children: list["_Phase"] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        running = sum(child.fraction for child in self.children) / max(len(self.children), 1)
        return min(1.0, (self.done + min(running, 1.0)) / max(self.steps, 1))


class Progress:
    """Follows the calls of TensorRT's `IProgressMonitor`; names of phases are unique while they run."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[_Phase, _Phase | None]] = {}
        self._root: _Phase | None = None
        self._fraction = 0.0

    @property
    def fraction(self) -> float:
        """How much of the build is done, 0 to 1; steps differ in length, so it isn't the share of the time."""
        if self._root is not None:
            self._fraction = max(self._fraction, self._root.fraction)
        return self._fraction

    def start(self, name: str, parent: str | None, steps: int) -> None:
        above = self._running.get(parent, (None, None))[0] if parent else None
        phase = _Phase(steps)
        if above is not None:
            above.children = [phase]
        elif self._root is None:
            self._root = phase
        self._running[name] = (phase, above)

    def step(self, name: str, step: int) -> None:
        if name in self._running:
            phase, _ = self._running[name]
            phase.done, phase.children = min(step + 1, phase.steps), []

    def finish(self, name: str) -> None:
        phase, above = self._running.pop(name, (None, None))
        if phase is None:
            return
        phase.done, phase.children = phase.steps, []
        if above is not None:
            above.children = []


def _monitor(trt: ModuleType, tell: Callable[..., None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Tells the progress now and then; called from the builder's threads, one at a time under the GIL."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress = Progress()
            self.told = self.heard = time.perf_counter()
            self.longest_silence = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.progress.start(phase_name, parent_phase, num_steps)
            self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.progress.step(phase_name, step)
            self._tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.progress.finish(phase_name)
            self._tell()

        def _tell(self) -> None:
            now = time.perf_counter()
            self.longest_silence = max(self.longest_silence, now - self.heard)
            self.heard = now
            if now - self.told >= _PROGRESS_SECONDS:
                self.told = now
                tell(fraction=self.progress.fraction)

    return Monitor()


def peak_memory() -> int:
    """The most memory this process ever held, in bytes; 0 where the system doesn't tell."""
    # not getrusage: its maximum is handed down from the process that started this one
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
