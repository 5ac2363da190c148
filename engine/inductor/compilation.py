"""Networks exported and compiled by AOTInductor in this process, their weights stored beside them once."""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from storyadapter.engine.inductor import package_name, weights_name
from storyadapter.engine.inductor.complaints import first_complaint
from storyadapter.engine.inductor.fusion import fuse_denoiser
from storyadapter.engine.inductor.launch_analysis import analysed_once
from storyadapter.engine.inductor.operators import Operators, operators_for
from storyadapter.engine.inductor.session import InductorNetwork, names_of_weights, read_weights
from storyadapter.engine.inductor.shapes import channels_last, compiled_ranges, example_sizes
from storyadapter.export.dynamic_shapes import dynamic_shapes
from storyadapter.export.examples import Example, example_inputs, run_examples
from storyadapter.export.verify import ExportError, relative_error
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import NetworkSpec, Range, network_specs
from storyadapter.model.modules import ModelParts, iterate_modules
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.model.unet import Denoiser

# Measured on an H100 at S = 4096 and 10 heads: cuDNN 480 TFLOP/s, FlashAttention-2 304.
_ATTENTION: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# ‖compiled − eager‖ / ‖eager‖. Sums are taken in another order, and on a GPU fp32 convolutions use TF32 in both.
_TOLERANCE: Final[Mapping[Precision, float]] = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 6e-2}
_OPTIONS: Final[Mapping[str, Any]] = {
    "aot_inductor.package_constants_in_so": False,
    # the code that launches the kernels: one function of several MB, compiled in half the time; graphs replay it anyway
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
# The host runs no kernel of a package for a GPU. To try out which vector instructions it has takes six programs,
# compiled once and started by every process that compiles.
_GPU_OPTIONS: Final[Mapping[str, Any]] = {**_OPTIONS, "cpp.vec_isa_ok": False}


@dataclass(frozen=True)
class BuildRequest:
    """Some networks of a model, and what to compile them for.

    Attributes:
        checkpoint: an opened checkpoint, or anything else that gives the model's parts and can be pickled.
        networks: their names.
        letters: the range of every dynamic letter, as `ShapeRanges.letters` gives them.
        device: to compile for.
        folder: gets packages and weights.
    """

    checkpoint: ModelParts
    networks: tuple[str, ...]
    numerics: Numerics
    letters: Mapping[str, Range]
    device: torch.device
    folder: Path


def build_networks(request: BuildRequest, on_stage: Callable[[str, str], None]) -> dict[str, float]:
    """Compile one network after the other, each compared with eager on the device.

    Args:
        on_stage: called with a network's name ("" for none in particular) and what is done to it.

    Returns:
        Relative error against eager by network.

    Raises:
        EngineBuildError: a network can't be compiled, or computes something else than eager.
    """
    specs, operators = network_specs(request.checkpoint.geometry), operators_for(request.device)
    errors = {}
    modules = iterate_modules(request.checkpoint, request.numerics, operators.grca, request.networks)
    while True:
        on_stage("", "loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            return errors
        # the module is handed over: nothing here keeps its weights
        taken, module = [module.to(request.device)], None
        options = NetworkOptions(request.numerics[name], request.letters, operators)
        errors[name] = build_network(specs[name], taken, options, request.folder, functools.partial(on_stage, name))


@dataclass(frozen=True)
class NetworkOptions:
    """What a network is compiled with; `letters` as in `ShapeRanges.letters`."""

    precision: Precision
    letters: Mapping[str, Range]
    operators: Operators


def build_network(
    spec: NetworkSpec,
    taken: list[nn.Module],
    options: NetworkOptions,
    folder: Path,
    on_stage: Callable[[str], None] = lambda what: None,
) -> float:
    """Compile one network, store package and weights, and compare it with eager.

    Args:
        taken: the module, in eval mode and in the network's dtype, on the device to compile for; taken out of the list
            and used up.

    Returns:
        The relative error against eager.

    Raises:
        EngineBuildError: the network can't be compiled, or computes something else than eager.
    """
    module = taken.pop()
    device = next(module.parameters()).device
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()  # the only layout that a file keeps
    ranges = compiled_ranges(spec, options.letters)
    # before the module is rewritten: the comparison shall see the rewriting, too
    on_stage("running eager")
    examples = run_examples(spec, module, options.letters, options.precision)
    if isinstance(module, Denoiser):
        fuse_denoiser(module, options.operators)
    channels_last_names = channels_last(module) if device.type == "cuda" else []
    on_stage("exporting")
    inputs = example_inputs(spec, example_sizes(ranges, device), options.precision)
    arguments = tuple(value.to(device) for value in inputs.values())
    with _compiling(spec.name):
        program = torch.export.export(
            module, arguments, dynamic_shapes=dynamic_shapes(spec, module, ranges), strict=False
        )
        on_stage("compiling")
        package = folder / package_name(spec.name)
        configs = _GPU_OPTIONS if device.type == "cuda" else _OPTIONS
        with analysed_once():
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=configs)
    constants = {**program.state_dict, **program.constants}
    del program, inputs, arguments, module
    on_stage("storing weights")
    stored = folder / weights_name(spec.name)
    _save(stored, {name: constants[name] for name in names_of_weights(package, device)}, channels_last_names)
    del constants
    on_stage("comparing with eager")
    weights = read_weights(stored, device)
    network = InductorNetwork(spec, folder, options.precision, device, options.letters, weights)
    return _compare(network, examples, options.precision)


@contextlib.contextmanager
def _compiling(name: str) -> Iterator[None]:
    try:
        with torch.no_grad(), warnings.catch_warnings(), sdpa_kernel(_ATTENTION, set_priority=True):
            warnings.simplefilter("ignore")
            yield
    except (RuntimeError, ValueError) as error:
        raise EngineBuildError(f"{name}: {type(error).__name__}: {first_complaint(str(error))}") from error


def _compare(network: InductorNetwork, examples: Sequence[Example], precision: Precision) -> float:
    worst = 0.0
    for example in examples:
        got = network(example.inputs)
        for name, expected in example.outputs.items():
            where = f"{network.spec.name}: output {name}"
            try:
                error = relative_error(where, got[name], expected, precision, _TOLERANCE[precision])
            except ExportError as refused:
                raise EngineBuildError(str(refused)) from refused
            worst = max(worst, error)
    return worst


def _save(path: Path, weights: Mapping[str, Tensor], channels_last_names: list[str]) -> None:
    # the file's format knows no strides; `session` restores them by these names
    tensors = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    save_file(tensors, path, metadata={"channels_last": json.dumps(channels_last_names)})
    path.chmod(0o644)  # the library makes it readable for its owner alone
