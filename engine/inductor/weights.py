"""The weights that packages read, made from a checkpoint's tensors without the modules that they were compiled from.

What loading, taking the UNet apart and fusing do to the tensors is recorded once for an architecture, on tensors
without values, and then done to any checkpoint of its kind: to import diffusers takes longer than to read 10 GB.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from storyadapter.checkpoint.recipes import Recipe, follow, record
from storyadapter.checkpoint.remembered import digest_of, remembered
from storyadapter.engine.identity import configuration_digest
from storyadapter.engine.inductor import SOURCES
from storyadapter.engine.sources import sources_digest
from storyadapter.model.grca import grca
from storyadapter.model.ip_adapter import AdapterLayer, IPAdapterWeights
from storyadapter.model.modules import iterate_modules, model_parts
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import Numerics

_META: Final = torch.device("meta")
_READING: Final = ("storyadapter.checkpoint.checkpoint", "storyadapter.checkpoint.recipes")


def read_weights(
    checkpoint: Checkpoint, numerics: Numerics, device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By network, one part of the checkpoint after the other, what `prepare` gives for the modules of
    `iterate_modules`, on `device`, to the bit.

    Args:
        checkpoint: no network of which is rewritten.

    Raises:
        CheckpointError: a file isn't what was checked.
    """
    for part, names in model_parts(checkpoint.geometry).items():
        tensors = _tensors(checkpoint, part, TORCH_DTYPES[numerics[names[-1]]], device)
        recipe = _recipe(checkpoint, numerics, device, part, tensors)
        weights = follow(recipe, tensors)
        for name in names:
            own = f"{name}/"
            yield name, {key.removeprefix(own): weights.pop(key) for key in [*weights] if key.startswith(own)}


def remember_recipes(checkpoint: Checkpoint, numerics: Numerics, device: torch.device) -> None:
    """Find out now what `read_weights` needs to know, so that the first run needn't; reads no weights."""
    for part, names in model_parts(checkpoint.geometry).items():
        tensors = _tensors(checkpoint, part, TORCH_DTYPES[numerics[names[-1]]], _META)
        _recipe(checkpoint, numerics, device, part, tensors)


def _recipe(
    checkpoint: Checkpoint, numerics: Numerics, device: torch.device, part: str, tensors: Mapping[str, Tensor]
) -> Recipe:
    """What is done to these tensors, by whose shapes and dtypes it is remembered."""
    shapes = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]
    sources = sources_digest((*SOURCES, *_READING, __name__))
    configuration = configuration_digest(checkpoint.configuration)
    key = digest_of(part, shapes, configuration, numerics.as_dict(), device.type, sources)

    def prepared(known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the modules that are made of these tensors, by network and name."""
        from storyadapter.engine.inductor.fusion import prepare

        only = model_parts(checkpoint.geometry)[part]
        modules = iterate_modules(_Parts(checkpoint, known), numerics, grca, only)
        return {f"{name}/{key}": value for name, module in modules for key, value in prepare(module, device).items()}

    def make() -> Recipe:
        empty = {name: torch.empty(t.shape, dtype=t.dtype, device=_META) for name, t in tensors.items()}
        return record(prepared, empty)

    return remembered("weights", key, make)


def _tensors(checkpoint: Checkpoint, part: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """All that the networks of a part are made from, by name, in the order of names; on the meta device no weights."""
    if device == _META:
        shapes = checkpoint.shapes(part).items()
        loaded = {name: torch.empty(shape, dtype=dtype, device=_META) for name, shape in shapes}
    else:
        loaded = checkpoint.load_tensors(part, dtype, device)
    tensors = {f"{part}/{name}": tensor for name, tensor in sorted(loaded.items())}
    if part == "unet":
        adapter = checkpoint.load_ip_adapter(dtype, device)
        tensors |= {f"adapter/{name}": getattr(adapter, name) for name in _ADAPTER}
        for layer in adapter.layers:
            tensors |= {f"adapter/{layer.module}/to_k": layer.to_k, f"adapter/{layer.module}/to_v": layer.to_v}
    return tensors


_ADAPTER: Final = ("projection_weight", "projection_bias", "norm_weight", "norm_bias")


class _Parts:
    """A checkpoint whose parts have given tensors; see `storyadapter.model.modules.ModelParts`."""

    rewrites: Mapping[str, Any] = {}

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        self.geometry = checkpoint.geometry
        self._checkpoint, self._tensors = checkpoint, tensors

    def load(self, part: str, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        network, own = self._checkpoint.empty_network(part), f"{part}/"
        state = {name.removeprefix(own): tensor for name, tensor in self._tensors.items() if name.startswith(own)}
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False)

    def load_ip_adapter(self, dtype: torch.dtype, device: torch.device | None = None) -> IPAdapterWeights:
        names = (name.split("/") for name in self._tensors)
        modules = [name[1] for name in names if name[0] == "adapter" and name[-1] == "to_k"]
        layers = (
            AdapterLayer(module, *(self._tensors[f"adapter/{module}/{matrix}"] for matrix in ("to_k", "to_v")))
            for module in modules
        )
        return IPAdapterWeights(**{name: self._tensors[f"adapter/{name}"] for name in _ADAPTER}, layers=tuple(layers))
