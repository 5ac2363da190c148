"""What a function does to tensors, recorded without values and done again."""

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from storyadapter.checkpoint.recipes import follow, record

SHAPES = {"q": (4, 6), "k": (2, 6), "kernel": (3, 2, 3, 3), "unused": (5,)}


def meta() -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in SHAPES.items()}


def values(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in SHAPES.items()}


def arrange(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stacked = nn.Parameter(torch.cat([given["q"], given["k"]]).detach(), requires_grad=False)
    first, second = given["q"].chunk(2)
    kernel = nn.Conv2d(2, 3, 3, device="meta")
    kernel.weight = nn.Parameter(given["kernel"], requires_grad=False)
    kernel.weight.data = kernel.weight.data.to(memory_format=torch.channels_last)
    return {
        "stacked": stacked,
        "same": given["k"],
        "interleaved": torch.stack([first, second], dim=1).reshape(4, 6),
        "transposed": given["k"].t().contiguous(),
        "again": stacked.data,
        "kernel": kernel.weight,
        "positions": torch.arange(3).expand(1, -1),
        "half": given["q"].float()[1:].to(torch.bfloat16),
    }


def test_other_values_are_arranged_alike() -> None:
    recipe = json.loads(json.dumps(record(arrange, meta())))
    for seed in (0, 1):
        found, expected = follow(recipe, values(seed)), arrange(values(seed))
        assert [*found] == [*expected]
        for name, value in expected.items():
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
            assert found[name].stride() == value.stride() or name == "positions", name


def test_inputs_are_let_go_and_may_lie_in_another_order_in_memory() -> None:
    recipe, given = record(arrange, meta()), values()
    expected = arrange(given)
    given["k"] = given["k"].t().contiguous().t()  # as a pickle may hold it
    found = follow(recipe, given)
    assert given == {} and torch.equal(found["stacked"], expected["stacked"])


def test_what_does_not_come_from_the_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="x doesn't come from what was given"):
        record(lambda given: {"x": torch.empty(2, device="meta")}, meta())
    with pytest.raises(RuntimeError):  # what looks at values can't be recorded
        record(lambda given: {"x": given["q"] * given["k"].max().item()}, meta())


def test_other_tensors_than_were_recorded_are_refused() -> None:
    recipe = record(arrange, meta())
    with pytest.raises(ValueError, match="other tensors than were recorded"):
        follow(recipe, {"q": torch.ones(4, 6)})
    with pytest.raises((ValueError, RuntimeError)):
        follow(recipe, values() | {"q": torch.ones(8, 6).half()})


def test_operators_of_others_are_not_run() -> None:
    recipe = record(arrange, meta())
    recipe["steps"][0][0] = "os.system.default"
    with pytest.raises(ValueError, match=r"os\.system\.default is no operator"):
        follow(recipe, values())
