"""Networks of which some are replaced, to count calls or to be short of memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from storyadapter.model.contract import NetworkSpec
from storyadapter.model.networks import Network, Networks


def with_networks(networks: Networks, **others: Network) -> Networks:
    """The same networks but for those named."""
    return replace(networks, by_name={**networks.by_name, **others})


@dataclass
class CountingNetwork:
    """Passes a call on to a network, and counts the calls and the rows of its first input."""

    network: Network
    counts: Counter = field(default_factory=Counter)

    @property
    def spec(self) -> NetworkSpec:
        return self.network.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.counts[self.spec.name] += 1
        self.counts[f"{self.spec.name} rows"] += len(inputs[self.spec.inputs[0].name])
        return self.network(inputs)


def counting(networks: Networks, *names: str) -> tuple[Networks, Counter]:
    counts: Counter = Counter()
    return with_networks(networks, **{name: CountingNetwork(networks[name], counts) for name in names}), counts


@dataclass
class SmallMemory:
    """A network on a device whose memory suffices for so many rows at once."""

    network: Network
    rows: int
    asked: list[int] = field(default_factory=list)

    @property
    def spec(self) -> NetworkSpec:
        return self.network.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.asked.append(len(inputs["latents"]))
        if self.asked[-1] > self.rows:
            raise torch.OutOfMemoryError(f"{self.asked[-1]} rows")
        return self.network(inputs)


@dataclass
class ShortOfMemory:
    """A network for which the memory doesn't suffice in its first `times` calls."""

    network: Network
    times: int

    @property
    def spec(self) -> NetworkSpec:
        return self.network.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError(f"{self.spec.name}")
        return self.network(inputs)
