"""Compiled networks, opened: nothing is compiled here, and weights are read once."""

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from storyadapter.engine.graphs import GraphStepRunner
from storyadapter.engine.inductor import package_name, weights_name
from storyadapter.engine.inductor.shapes import compiled_ranges, cut, doubled
from storyadapter.engine.loading import load_each
from storyadapter.engine.out_of_memory import told_as_out_of_memory
from storyadapter.model.contract import Geometry, NetworkSpec, Range, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.networks import Networks, check_inputs, run_directly
from storyadapter.model.numerics import Numerics, Precision

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel

# Above this share of the free memory the weights leave too little for frames: all but the denoiser's stay on the host.
_OFFLOAD_ABOVE = 0.5
# Packages for the CPU call this operator by its name: it is registered when its module is imported.
_CALLED_BY_NAME = (grca,)


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
            weights: by name, at least those that the package reads; on `device`, or on the host if `offloaded`.
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
        return {tensor.name: value for tensor, value in zip(self.spec.outputs, outputs, strict=True)}

    def _bind(self, weights: dict[str, Tensor]) -> None:
        # user_managed: the package reads them where they lie instead of keeping a copy. PyTorch 2.11 to 2.13 never let
        # go of a tensor that was bound so (pull request 194480), so memory is given back by emptying its storage.
        self._package.load_constants(weights, check_full_update=True, user_managed=True)

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
        with torch.inference_mode(), told_as_out_of_memory(self.device):
            outputs = self._package(*tensors)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _open_package(path: Path, device: torch.device) -> "AOTICompiledModel":
    # PyTorch compares this machine with that of the build. To tell which vector instructions the host has it compiles
    # programs and starts them, some 40 s in every process (PyTorch 2.11), and a package for a GPU has none of these.
    on_gpu = device.type == "cuda"
    index = device.index if on_gpu and device.index is not None else -1
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False} if on_gpu else {}):
        # run_single_threaded: the other mode keeps a pool of runners that synchronizes, which no graph can capture
        return torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index)


def names_of_weights(package: Path, device: torch.device) -> list[str]:
    """Of those that a package reads."""
    names: list[str] = _open_package(package, device).get_constant_fqns()
    return names


def _without_memory(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape, type and layout on a device, whose storage is empty."""
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    empty.untyped_storage().resize_(0)
    return empty


def _give_back(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Weights of a package in the layouts that it was compiled for; in pinned memory where `device` is the host."""
    pinned = device.type == "cpu" and torch.cuda.is_available()
    with safe_open(path, framework="pt", device=str(device)) as file:
        channels_last = set(json.loads(file.metadata()["channels_last"]))
        weights = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            value = file.get_tensor(name)
            if name in channels_last:
                value = value.contiguous(memory_format=torch.channels_last)
            weights[name] = value.pin_memory() if pinned else value
    return weights


def open_inductor(
    folder: Path,
    geometry: Geometry,
    numerics: Numerics,
    letters: Mapping[str, Range],
    device: torch.device,
    on_progress: Callable[[str, str], None] = lambda network, what: None,
) -> Networks:
    """Open the seven compiled networks of one engine folder.

    On a GPU the denoising step is captured as CUDA graphs. Where the weights would take more than half of the memory
    that is free, only the denoiser's stay there and the others come from the host for each call.

    Args:
        on_progress: called with each network's name and what is done, before it is.
    """
    on_gpu = device.type == "cuda"
    short = on_gpu and _weigh_too_much(folder, geometry, device)

    def stays_on_host(name: str) -> bool:
        return short and name != "denoiser"

    def tell(name: str) -> None:
        where = "loading into host memory: little is free on the GPU" if stays_on_host(name) else "loading engine"
        on_progress(name, where)

    def load(spec: NetworkSpec) -> InductorNetwork:
        offloaded = stays_on_host(spec.name)
        weights = read_weights(folder / weights_name(spec.name), torch.device("cpu") if offloaded else device)
        precision = numerics[spec.name]
        return InductorNetwork(spec, folder, precision, device, letters, weights, offloaded=offloaded)

    return Networks(
        load_each(geometry, load, tell),
        geometry=geometry,
        backend="inductor",
        device=device,
        numerics=numerics,
        letters=letters,
        run_step=GraphStepRunner() if on_gpu else run_directly,
        padding_is_free=on_gpu,
    )


def _weigh_too_much(folder: Path, geometry: Geometry, device: torch.device) -> bool:
    """Whether all weights would take more than `_OFFLOAD_ABOVE` of the GPU's free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return sum((folder / weights_name(name)).stat().st_size for name in network_specs(geometry)) > _OFFLOAD_ABOVE * free
