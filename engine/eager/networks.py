"""Backend `eager`: the contract's networks as plain PyTorch modules. The reference, and the baseline of benchmarks."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.model.contract import NetworkSpec, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import ModelParts, iterate_modules
from storyadapter.model.networks import Networks, check_inputs
from storyadapter.model.numerics import Numerics, Precision

_FP32: Final = Numerics("fp32")


class EagerNetwork:
    """One module of the contract, called by names."""

    def __init__(self, spec: NetworkSpec, module: nn.Module, precision: Precision) -> None:
        self.spec = spec
        self.module = module
        self.precision: Precision = precision
        self.device = next(module.parameters()).device

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `storyadapter.model.networks.Network`."""
        check_inputs(self.spec, inputs, precision=self.precision, device=self.device, letters=None)
        with torch.inference_mode():
            outputs = self.module(*(inputs[spec.name] for spec in self.spec.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: value.contiguous() for spec, value in zip(self.spec.outputs, outputs, strict=True)}


def open_eager(
    checkpoint: Checkpoint, numerics: Numerics, device: torch.device, on_progress: Callable[[str], None]
) -> Networks:
    """Load every network of a checkpoint onto a device; `on_progress` gets each network's name before it is loaded."""
    geometry = checkpoint.geometry
    specs = network_specs(geometry)
    networks = {}
    for name, module in iterate_modules(checkpoint, numerics, grca, device=device):
        on_progress(name)
        networks[name] = EagerNetwork(specs[name], module, numerics[name])
    return Networks(networks, geometry=geometry, backend="eager", device=device, numerics=numerics, letters=None)


def open_fp32(checkpoint: ModelParts, device: torch.device, name: str) -> Networks:
    """One network alone in fp32; on a GPU channels last, as its convolutions are fastest."""
    [(_, module)] = iterate_modules(checkpoint, _FP32, grca, only=(name,), device=device)
    if device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it
    network = EagerNetwork(network_specs(checkpoint.geometry)[name], module, "fp32")
    return Networks({name: network}, checkpoint.geometry, "eager", device, _FP32, letters=None)
