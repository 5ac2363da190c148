"""Compiled networks, opened with the weights of a checkpoint: nothing is compiled here, and no weight is kept twice."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backend import ReportStage
from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.identity import model_weights
from storyadapter.engine.inductor import constants_name, package_name
from storyadapter.engine.inductor.shapes import compiled_ranges, cut, doubled
from storyadapter.engine.inductor.weights import read_weights
from storyadapter.engine.store import StoredEngine
from storyadapter.engine.uses import ERRORS, note_use
from storyadapter.model.contract import NetworkSpec, Range, controlnet_name, network_specs
from storyadapter.model.examples import Example, compare_with_eager, run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.networks import Networks, check_inputs, run_directly
from storyadapter.model.numerics import Numerics, Precision

if TYPE_CHECKING:
    from torch._C._aoti import AOTIModelPackageLoader

# Above this share of the free memory the weights leave too little for frames: those of the steps alone stay there.
_OFFLOAD_ABOVE = 0.5


class InductorNetwork:
    """A network of the contract as an AOTInductor package."""

    def __init__(
        self,
        spec: NetworkSpec,
        folder: Path,
        precision: Precision,
        device: torch.device,
        letters: Mapping[str, Range],
        weights: Mapping[str, Tensor],
        *,
        offloaded: bool = False,
    ) -> None:
        """
        Args:
            spec, precision, letters: what the package was compiled for.
            folder: holds the package.
            device: what it was compiled for.
            weights: of `prepare`; on `device`, or in pinned host memory if `offloaded`.
            offloaded: weights are copied to the device for each call, and their memory is given back after it.

        The memory of weights on a GPU is given back when the network goes, whoever else still names them.
        """
        self.spec = spec
        self.precision: Precision = precision
        self.device = device
        self.letters = letters
        self.offloaded = offloaded
        self._compiled = compiled_ranges(spec, letters)
        self._package = _open_package(folder / package_name(spec.name), device)
        constants = folder / constants_name(spec.name)
        if constants.exists():
            weights = {**weights, **load_file(constants, "cpu" if offloaded else str(device))}
        self.weights = {name: weights[name] for name in self._package.get_constant_fqns()}
        self._bound: dict[str, Tensor] = {}
        if offloaded:
            self._bound = {name: _without_memory(value, device) for name, value in self.weights.items()}
        else:
            self._bind(self.weights)
            if device.type == "cuda":
                weakref.finalize(self, _give_back, tuple(self.weights.values())).atexit = False

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `storyadapter.model.networks.Network`."""
        # a package doesn't look at strides: a view would give wrong numbers without an error
        sizes = check_inputs(self.spec, inputs, precision=self.precision, device=self.device, letters=self.letters)
        tensors = [inputs[tensor.name] for tensor in self.spec.inputs]
        if not self.offloaded:
            outputs = self._run(tensors, sizes)
        else:
            try:
                with torch.inference_mode():
                    for name, value in self._bound.items():
                        value.untyped_storage().resize_(value.nbytes)
                        value.copy_(self.weights[name], non_blocking=True)
                self._bind(self._bound)  # again, as the memory is another
                outputs = self._run(tensors, sizes)
            finally:
                # the allocator gives memory to other work of this stream only, so what is given back is read before
                _give_back(self._bound.values())
        # An exporter traces convolutions with cuDNN off, so that NCHW comes of them, and leaves out a `contiguous()`
        # that has nothing to do there; in the compiled code they may be channels-last.
        named = zip(self.spec.outputs, outputs, strict=True)
        return {tensor.name: value.contiguous() for tensor, value in named}

    def _bind(self, weights: dict[str, Tensor]) -> None:
        # user-managed: the package reads them where they lie instead of keeping a copy. PyTorch 2.11 to 2.13 never let
        # go of a tensor that was bound so (pull request 194480), so memory is given back by emptying its storage.
        self._package.load_constants(weights, *(False, True, True))  # all of them, for use at once, user-managed

    def _run(self, tensors: list[Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
        if self._compiled.get("F") == Range(1, 1) and sizes["F"] > 1:
            parts = [self._call([tensor[frame : frame + 1] for tensor in tensors]) for frame in range(sizes["F"])]
            return [torch.cat(values) for values in zip(*parts, strict=True)]
        ones = [name for name, value in self._compiled.items() if sizes[name] < value.minimum]
        if not ones:
            return self._call(tensors)
        outputs = self._call(doubled(self.spec, tensors, ones))
        return [cut(tensor, value, ones) for tensor, value in zip(self.spec.outputs, outputs, strict=True)]

    def _call(self, tensors: list[Tensor]) -> list[Tensor]:
        with torch.inference_mode(), as_out_of_memory(self.device):
            return self._package.boxed_run(list(tensors))  # which empties the list


def _open_package(path: Path, device: torch.device) -> "AOTIModelPackageLoader":
    """PyTorch's reader of packages itself. What `torch._inductor.aoti_load_package` puts around it imports the whole
    compiler, and compares this machine with that of the build by compiling programs; an engine's identity says that."""
    index = device.index if device.type == "cuda" and device.index is not None else -1
    # single-threaded: the other mode keeps a pool of runners that synchronizes, which no graph can capture
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)


def _without_memory(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape, type and layout on a device, whose storage is empty."""
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    empty.untyped_storage().resize_(0)
    return empty


def _give_back(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def open_inductor(
    engine: StoredEngine, checkpoint: Checkpoint, numerics: Numerics, device: torch.device, on_stage: ReportStage
) -> Networks:
    """The networks of a checkpoint on an engine's code, compared with eager at the first use with its weights.

    On a GPU the denoising step is captured as CUDA graphs. Where the weights would take more than half of the memory
    that is free, only those of the steps stay there and the others come from the host for each call.

    Args:
        numerics: those of the engine, with the scales that the checkpoint's networks have.

    Raises:
        EngineBuildError: a network computes something else than eager with these weights; nothing is noted.
    """
    compared = was_compared(engine, checkpoint)
    letters = engine.ranges.letters(checkpoint.geometry.pixels_per_latent)
    on_gpu = device.type == "cuda"
    short = on_gpu and engine.details["weight_bytes"] > _OFFLOAD_ABOVE * torch.cuda.mem_get_info(device)[0]
    specs = network_specs(checkpoint.geometry)
    in_steps = ("denoiser", *map(controlnet_name, range(len(checkpoint.geometry.controls))))
    networks: dict[str, InductorNetwork] = {}
    errors: dict[str, float] = {}
    on_stage("", "loading weights")
    loaded: Iterator[tuple[str, dict[str, Tensor], Sequence[Example]]]
    if compared and not checkpoint.rewrites and isinstance(checkpoint, Checkpoint):  # a benchmark's has no files
        loaded = ((name, weights, ()) for name, weights in read_weights(checkpoint, numerics, device))
    else:
        loaded = _with_examples(checkpoint, numerics, letters, device, compared)
    for name, weights, examples in loaded:
        spec, precision, offloaded = specs[name], numerics[name], short and name not in in_steps
        where = "loading into host memory: little is free on the GPU" if offloaded else "loading engine"
        on_stage(name, where if compared else "the engine's code with other weights: comparing with eager")
        if offloaded:
            weights = {key: value.cpu().pin_memory() for key, value in weights.items()}
        networks[name] = InductorNetwork(spec, engine.folder, precision, device, letters, weights, offloaded=offloaded)
        if examples:
            errors[name] = compare_with_eager(name, networks[name], examples, precision, numerics.tolerance(name))
        del weights, examples
        on_stage("", "loading weights")
    if on_gpu:
        torch.cuda.empty_cache()  # what rewriting and comparing took is free for frames
    if not compared:
        note_use(engine.folder, model_weights(checkpoint).key, checkpoint.label, {ERRORS: errors})
    return Networks(
        networks,
        geometry=checkpoint.geometry,
        backend="inductor",
        device=device,
        numerics=numerics,
        letters=letters,
        run_step=GraphStepRunner() if on_gpu else run_directly,
        padding_is_free=on_gpu,
    )


def _with_examples(
    checkpoint: Checkpoint, numerics: Numerics, letters: Mapping[str, Range], device: torch.device, compared: bool
) -> Iterator[tuple[str, dict[str, Tensor], Sequence[Example]]]:
    """By network, the weights of eager's modules, and what these computed of examples, unless that was compared."""
    from storyadapter.engine.inductor.fusion import prepare

    for name, module in iterate_modules(checkpoint, numerics, grca, device=device):
        spec = network_specs(checkpoint.geometry)[name]
        ranges = {**letters, **compiled_ranges(spec, letters)}
        examples = () if compared else run_examples(spec, module, ranges, numerics[name])
        weights = [prepare(module, device)]
        del module
        yield name, weights.pop(), examples  # what a suspended generator still names would stay in memory


def was_compared(engine: StoredEngine, checkpoint: Checkpoint) -> bool:
    """Whether this code was found to compute what eager computes with a checkpoint's weights."""
    use = engine.uses.get(model_weights(checkpoint).key)
    errors = use.details.get(ERRORS) if use else None
    return isinstance(errors, dict) and errors.keys() == network_specs(checkpoint.geometry).keys()


@contextmanager
def as_out_of_memory(device: torch.device) -> Iterator[None]:
    """Inside, an error behind which a GPU's memory ran out is a `torch.OutOfMemoryError`.

    A package of AOTInductor passes on only that one of its calls failed.
    """
    if device.type != "cuda":
        yield
        return
    before = _times_out_of_memory(device)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _times_out_of_memory(device) == before:
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def _times_out_of_memory(device: torch.device) -> int:
    """How often PyTorch's allocator told that memory ran out."""
    return torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0)
