"""Networks exported and compiled by AOTInductor in this process: code alone, which serves any weights of its kind."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from storyadapter.engine.inductor import constants_name, package_name
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.launch_analysis import analysed_once
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.engine.inductor.shapes import compiled_ranges, example_sizes
from storyadapter.engine.processes import first_error
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import NetworkSpec, Range, network_specs
from storyadapter.model.dynamic_shapes import dynamic_shapes
from storyadapter.model.examples import compare_with_eager, example_inputs, run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import ModelParts, iterate_modules
from storyadapter.model.numerics import Numerics

# Measured on an H100 at S = 4096 and 10 heads: cuDNN 480 TFLOP/s, FlashAttention-2 304.
_ATTENTION: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CONSTANTS_AT_MOST: Final = 1 << 20  # bytes: a larger one would be a weight that code shall not hold
_OPTIONS: Final[Mapping[str, Any]] = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # or the values of weights of up to eight numbers would stand in the code
    # the code that launches the kernels: one function of several MB, compiled in half the time; graphs replay it anyway
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
# The host runs no kernel of a package for a GPU. To try out which vector instructions it has takes six programs,
# compiled once and started by every process that compiles.
_GPU_OPTIONS: Final[Mapping[str, Any]] = {**_OPTIONS, "cpp.vec_isa_ok": False}


@dataclass(frozen=True)
class BuildRequest:
    """Some networks of a model, and what to compile them for."""

    checkpoint: ModelParts  # an opened checkpoint, or anything else that gives the model's parts and can be pickled
    networks: tuple[str, ...]  # their names
    numerics: Numerics
    letters: Mapping[str, Range]  # the range of every dynamic letter, as `ShapeRanges.letters` gives them
    device: torch.device  # to compile for
    folder: Path  # gets the packages


class BuiltNetwork(NamedTuple):
    """What is to be known of a compiled network: its error against eager, and how many bytes its weights have."""

    relative_error: float
    weight_bytes: int


def build_networks(request: BuildRequest, tell: Callable[..., None]) -> dict[str, BuiltNetwork]:
    """Compile one network after the other, each compared with eager on the device.

    Args:
        tell: called with `network`, its name ("" for none in particular), and `stage`, what is done to it.

    Raises:
        EngineBuildError: a network can't be compiled, or computes something else than eager.
    """
    specs = network_specs(request.checkpoint.geometry)
    built: dict[str, BuiltNetwork] = {}
    modules = iterate_modules(request.checkpoint, request.numerics, grca, request.networks, request.device)
    while True:
        tell(network="", stage="loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            return built

        def on_stage(stage: str, network: str = name) -> None:
            tell(network=network, stage=stage)

        built[name] = build_network(specs[name], module, request.numerics, request.letters, request.folder, on_stage)
        del module


def build_network(
    spec: NetworkSpec,
    module: nn.Module,
    numerics: Numerics,
    letters: Mapping[str, Range],
    folder: Path,
    on_stage: Callable[[str], None] = lambda what: None,
) -> BuiltNetwork:
    """Compile one network, store its package, and compare it with eager.

    Args:
        letters: their ranges, as in `ShapeRanges.letters`.
        module: in eval mode and in the network's dtype, on the device to compile for; it is rewritten.

    Raises:
        EngineBuildError: the network can't be compiled, or computes something else than eager.
    """
    device, precision = next(module.parameters()).device, numerics[spec.name]
    ranges = compiled_ranges(spec, letters)
    # before the module is rewritten: the comparison shall see the rewriting, too
    on_stage("running eager")
    examples = run_examples(spec, module, {**letters, **ranges}, precision)
    weights = prepare(module, device)
    on_stage("exporting")
    inputs = example_inputs(spec, example_sizes(ranges, device), precision)
    arguments = tuple(value.to(device) for value in inputs.values())
    with _compiling(spec.name):
        program = torch.export.export(
            module, arguments, dynamic_shapes=dynamic_shapes(spec, module, ranges), strict=False
        )
        on_stage("compiling")
        package = folder / package_name(spec.name)
        configs = _GPU_OPTIONS if device.type == "cuda" else _OPTIONS
        with analysed_once():
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs={**configs})
    _save(spec, {name: value for name, value in program.constants.items() if name not in weights}, folder)
    on_stage("comparing with eager")
    network = InductorNetwork(spec, folder, precision, device, letters, weights)
    if unread := sorted(_weights_used(program) - network.weights.keys()):
        raise EngineBuildError(
            f"{spec.name}: the code holds the values of {', '.join(unread)}; expected code that reads all weights"
        )
    del program, inputs, arguments
    error = compare_with_eager(spec.name, network, examples, precision, numerics.tolerance(spec.name))
    return BuiltNetwork(error, sum(value.nbytes for value in network.weights.values()))


@contextlib.contextmanager
def _compiling(name: str) -> Iterator[None]:
    try:
        with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(_ATTENTION, set_priority=True):
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, ValueError) as error:
        raise EngineBuildError(f"{name}: {type(error).__name__}: {first_error(str(error))}") from error


def _weights_used(program: torch.export.ExportedProgram) -> set[str]:
    """The names of the parameters and buffers on which what a program computes depends."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    program.graph.eliminate_dead_code()
    return {names[node.name] for node in program.graph.nodes if node.name in names and node.users}


def _save(spec: NetworkSpec, constants: Mapping[str, Any], folder: Path) -> None:
    tensors = {name: value.detach().contiguous().cpu() for name, value in constants.items()}
    if not tensors:
        return
    if (size := sum(value.nbytes for value in tensors.values())) > _CONSTANTS_AT_MOST:
        raise EngineBuildError(
            f"{spec.name}: {size:,} bytes of constants beside its weights; expected at most {_CONSTANTS_AT_MOST:,}"
        )
    path = folder / constants_name(spec.name)
    save_file(tensors, path)
    path.chmod(0o644)  # the library makes it readable for its owner alone
