"""What a backend gives to the runtime: networks by name, behind one protocol."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from storyadapter.method.errors import Text
from storyadapter.model.contract import Geometry, NetworkSpec, Range, size_of
from storyadapter.model.numerics import Numerics, Precision


class Network(Protocol):
    """One network of the contract, ready to run."""

    spec: NetworkSpec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once.

        Args:
            inputs: by the contract's names, with the contract's shapes and dtypes, contiguous, on `Networks.device`.

        Returns:
            The contract's outputs by name, contiguous. A backend may reuse their memory in its next call: copy what
            must last.

        Raises:
            ValueError: a name, shape, dtype, device or range that the contract or the engine doesn't allow.
        """
        ...


class StepRunner(Protocol):
    """How a backend runs one step of the denoising loop."""

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step` once, perhaps by replaying what was recorded of it under `key`.

        Args:
            key: whenever it is equal, `step` reads and writes the same addresses.
            step: puts the work on the current stream, without waiting for it.
        """
        ...

    def forget(self) -> None:
        """Let go of what was recorded, and of the memory that it takes."""
        ...


class DirectStepRunner:
    """The `StepRunner` that records nothing."""

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        step()

    def forget(self) -> None: ...


run_directly = DirectStepRunner()


@dataclass(frozen=True)
class Networks:
    """The networks of one model on one backend, by the contract's names, with what a run must know of them."""

    by_name: Mapping[str, Network]
    geometry: Geometry
    backend: str
    device: torch.device
    numerics: Numerics
    letters: Mapping[str, Range] | None  # the engine's ranges; None where shapes are free
    run_step: StepRunner = run_directly  # how a step of the denoising loop is run
    # whether reference tokens behind `ref_length` take no time, as the fused kernel reads only those before it
    padding_is_free: bool = False
    # what a network's weights say of values of it, in this precision, that aren't finite, and what can help
    explain_not_finite: Callable[[str, Precision], tuple[Text, Text]] | None = None
    # one of the networks alone, loaded in fp32 as plain PyTorch, for values that this one can't hold. Raises
    # CheckpointError: a file isn't what it was, or can't be read any more
    load_fp32: "Callable[[str], Networks] | None" = None

    def __getitem__(self, name: str) -> Network:
        return self.by_name[name]

    def dtype(self, network: str) -> torch.dtype:
        """In which the contract's "network" tensors of this network are."""
        return TORCH_DTYPES[self.numerics[network]]

    def description(self) -> "Networks":
        """The same without the networks: what another process may know of them."""
        return replace(self, by_name={}, run_step=run_directly)


TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_inputs(
    spec: NetworkSpec,
    inputs: Mapping[str, Tensor],
    *,
    precision: Precision,
    device: torch.device,
    letters: Mapping[str, Range] | None,
) -> dict[str, int]:
    """The check that every backend makes before it runs a network; returns the value of every letter.

    Args:
        precision: of this network.

    Raises:
        ValueError: naming network, input, and what was expected.
    """
    values = spec.check_shapes({name: tuple(tensor.shape) for name, tensor in inputs.items()}, letters)
    for tensor_spec in spec.inputs:
        tensor = inputs[tensor_spec.name]
        expected = getattr(torch, tensor_spec.dtype_name(precision))
        where = f"{spec.name}: input {tensor_spec.name}"
        if tensor.dtype != expected:
            raise ValueError(f"{where} is {tensor.dtype}; expected {expected}")
        if tensor.device.type != device.type:
            raise ValueError(f"{where} is on {tensor.device}; expected {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{where} has strides {list(tensor.stride())}; expected a contiguous tensor")
    return values


def idle_inputs(networks: Networks, network: str, letters: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of a network with valid but meaningless values (zeros, and full lengths), to warm it up or to time it.

    Args:
        letters: a value for every letter that the network's inputs have.
    """
    inputs = {}
    for tensor in networks[network].spec.inputs:
        dtype = getattr(torch, tensor.dtype_name(networks.numerics[network]))
        shape = [size_of(dim, letters) for dim in tensor.shape]
        value = letters["R"] if tensor.name == "ref_length" else 0
        inputs[tensor.name] = torch.full(shape, value, dtype=dtype, device=networks.device)
    return inputs
