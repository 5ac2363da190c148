"""Example inputs of a network of the contract, for tracing it and for comparing what was made of it with eager."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import NetworkSpec, Range, TensorSpec, size_of
from storyadapter.model.numerics import Precision


@dataclass(frozen=True)
class Example:
    """Inputs of a network and what eager gives for them."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def example_letters(ranges: dict[str, Range], *, largest: bool = False) -> dict[str, int]:
    """A value for every letter: small but above 1 (an exporter takes 1 for a constant), within its range.

    With `largest`, another point of the ranges for a second comparison: every letter a little larger where it can be.
    """
    wanted = {"B": 2, "P": 2, "F": 2, "N": 3, "G": 2, "R": 8, "M": 2, "h": 8, "w": 8}
    if largest:
        wanted = {"B": 3, "P": 3, "F": 3, "N": 4, "G": 3, "R": 13, "M": 3, "h": 12, "w": 16}
    return {name: min(max(value, ranges[name].minimum), ranges[name].maximum) for name, value in wanted.items()}


def example_inputs(
    spec: NetworkSpec, letters: dict[str, int], precision: Precision, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs by name, on the CPU, with the contract's shapes and dtypes and with values in their real ranges."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for tensor in spec.inputs:
        shape = [size_of(dim, letters) for dim in tensor.shape]
        dtype = getattr(torch, tensor.dtype_name(precision))
        inputs[tensor.name] = _values(tensor, shape, letters, generator).to(dtype)
    return inputs


def run_examples(
    spec: NetworkSpec, module: nn.Module, ranges: Mapping[str, Range], precision: Precision
) -> tuple[Example, ...]:
    """Run a module eagerly, where its weights lie, at two points of its ranges, to compare an export with."""
    device = next(module.parameters()).device
    examples = []
    for seed, larger in enumerate((False, True)):
        letters = example_letters(dict(ranges), largest=larger)
        inputs = example_inputs(spec, letters, precision, seed)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.inference_mode():
            outputs = module(*inputs.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named = {tensor.name: value for tensor, value in zip(spec.outputs, outputs, strict=True)}
        examples.append(Example(inputs, named))
    return tuple(examples)


def compare_with_eager(
    label: str,
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    examples: Sequence[Example],
    precision: Precision,
    tolerance: float,
) -> float:
    """The largest ‖got − expected‖ / ‖expected‖ of any output.

    Args:
        label: names the network in a message.
        run: what is compared: gives the outputs for the inputs of an example, both by name.
        precision: for the message.
        tolerance: the largest error allowed.

    Raises:
        EngineBuildError: an output's shape is another, or its error is above `tolerance` or not finite.
    """
    worst = 0.0
    for example in examples:
        got = run(example.inputs)
        for name, expected in example.outputs.items():
            where = f"{label}: output {name}"
            if got[name].shape != expected.shape:
                raise EngineBuildError(
                    f"{where} has shape {tuple(got[name].shape)}; eager gives {tuple(expected.shape)}"
                )
            reference = expected.double().cpu()
            error = float((got[name].double().cpu() - reference).norm() / reference.norm())
            if not error <= tolerance:
                raise EngineBuildError(
                    f"{where} differs from eager by {error:.2e} (relative) in {precision}",
                    expected=f"at most {tolerance:g}",
                )
            worst = max(worst, error)
    return worst


def _values(tensor: TensorSpec, shape: list[int], letters: dict[str, int], generator: torch.Generator) -> Tensor:
    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    match tensor.name:
        case "input_ids":
            return integers(0, 256)
        case "text_row":
            return integers(0, letters["P"])
        case "ref_row":
            return integers(0, letters["G"])
        case "ref_length":
            return integers(1, letters["R"] + 1)
        case "timestep":
            return integers(1, 1000).float()
        case "sizes":
            return integers(0, 1024).float()
        case "scale":
            return torch.full(shape, 0.4)
        case _:
            return torch.randn(shape, generator=generator)
