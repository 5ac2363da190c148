"""How tensors are made from others, recorded as data: what a function does to tensors, done again without it.

Rearranging a checkpoint's weights needs the modules of diffusers; to do the same to other tensors of the same shapes
needs PyTorch alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LARGEST_CONSTANT: Final = 10_000  # values of a tensor that is written out

Recipe = dict[str, Any]  # plain data: "inputs" by place, "steps", and "outputs": name → place, shape and stride


def record(make: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], inputs: Mapping[str, Tensor]) -> Recipe:
    """What `make` does to inputs of these shapes and dtypes, whose values it must not look at.

    Args:
        inputs: on the meta device, contiguous.

    Raises:
        ValueError: an output comes from somewhere else, and is no small tensor of its own.
    """
    recorder = _Recorder(inputs)
    with recorder, torch.no_grad():
        outputs = make(inputs)
    return {
        "inputs": list(inputs),
        "steps": recorder.steps,
        "outputs": {name: recorder.output(name, tensor) for name, tensor in outputs.items()},
    }


def follow(recipe: Recipe, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a recipe for other values, in its order.

    Args:
        inputs: of the shapes and dtypes that it was recorded for, on one device; each is let go after its last use.

    Raises:
        ValueError: they aren't what it was recorded for.
    """
    if list(recipe["inputs"]) != list(inputs):
        raise ValueError("other tensors than were recorded")
    device = next(iter(inputs.values())).device
    values: dict[int, Tensor] = {}
    for place, name in enumerate(recipe["inputs"]):
        values[place] = inputs.pop(name).contiguous()
    uses = _uses(recipe)
    place = len(recipe["inputs"])
    wanted: dict[int, list[str]] = {}
    for name, output in recipe["outputs"].items():
        wanted.setdefault(output.get("place", -1), []).append(name)
    made: dict[str, Tensor] = {}

    def finished(at: int) -> None:
        """What is an output, and what nobody needs any more."""
        for name in wanted.get(at, ()):
            made[name] = values[at]
        if not uses[at]:
            values.pop(at, None)

    with torch.no_grad():
        for at in range(place):
            finished(at)
        for step in recipe["steps"]:
            operator, args, kwargs, count = step
            results = _operator(operator)(*_read(args, values), **_read(kwargs, values))
            for used in _places((args, kwargs)):
                uses[used] -= 1
                if not uses[used]:
                    values.pop(used, None)
            for result in results if count is not None else (results,):
                values[place] = result
                finished(place)
                place += 1
    for name in wanted.get(-1, ()):
        output = recipe["outputs"][name]
        made[name] = torch.tensor(output["values"], dtype=getattr(torch, output["dtype"]), device=device)
    for name, output in recipe["outputs"].items():
        if [list(made[name].shape), list(made[name].stride())] != [output["shape"], output["stride"]]:
            raise ValueError(f"{name} is of another shape than was recorded")
    return {name: made[name] for name in recipe["outputs"]}


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.steps: list[list[Any]] = []
        self._kept: list[Tensor] = []  # or another tensor's memory might have the same address
        self._places: dict[tuple[Any, ...], int] = {}
        self._count = 0
        for tensor in inputs.values():
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [*_tensors((args, kwargs or {}))]
        if tensors and all(_identity(tensor) in self._places for tensor in tensors):
            several = isinstance(result, list | tuple)
            count = len(result) if several else None
            self.steps.append([str(func), self._write(args), self._write(kwargs or {}), count])
            for tensor in result if several else (result,):
                self._add(tensor)
        return result

    def output(self, name: str, tensor: Tensor) -> dict[str, Any]:
        where = {"shape": list(tensor.shape), "stride": list(tensor.stride())}
        if (place := self._places.get(_identity(tensor))) is not None:
            return {**where, "place": place}
        if tensor.is_meta or tensor.numel() > _LARGEST_CONSTANT or tensor.is_floating_point():
            raise ValueError(f"{name} doesn't come from what was given")
        return {**where, "dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}

    def _add(self, tensor: Tensor) -> None:
        self._kept.append(tensor)
        self._places[_identity(tensor)] = self._count
        self._count += 1

    def _write(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"place": self._places[_identity(value)]}
        if isinstance(value, list | tuple):
            return [self._write(item) for item in value]
        if isinstance(value, dict):
            # the device is that of whatever is given
            return {"keys": {key: self._write(item) for key, item in value.items() if key != "device"}}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return {"torch": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"a step takes a {type(value).__name__}")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Which values of which memory; a parameter, or what was detached, is the same as what it was made of."""
    return (
        *(tensor.untyped_storage()._cdata, tensor.storage_offset()),
        *(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype),
    )


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _places(value: Any) -> Iterable[int]:
    if isinstance(value, dict):
        if "place" in value:
            yield value["place"]
        for item in value.get("keys", {}).values():
            yield from _places(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _places(item)


def _uses(recipe: Recipe) -> list[int]:
    steps = recipe["steps"]
    uses = [0] * (len(recipe["inputs"]) + sum(1 if count is None else count for *_, count in steps))
    for _, args, kwargs, _ in steps:
        for place in _places((args, kwargs)):
            uses[place] += 1
    return uses


def _read(value: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(item, values) for item in value]
    if isinstance(value, dict):
        if "place" in value:
            return values[value["place"]]
        if "torch" in value:
            return getattr(torch, value["torch"])
        return {key: _read(item, values) for key, item in value["keys"].items()}
    return value


def _operator(name: str) -> Any:
    """ "aten.cat.default" → the operator."""
    package, operator, overload = name.split(".")
    if package != "aten":
        raise ValueError(f"{name} is no operator of PyTorch's own")
    return getattr(getattr(torch.ops.aten, operator), overload)
