"""Trials whose networks compute something else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.trial import Trial
from storyadapter.model.contract import NetworkSpec
from storyadapter.model.networks import Network, Networks

Change = Callable[[str, Network], Network]


@dataclass(frozen=True)
class Wrong(Trial):
    """A trial whose networks are changed: `wrong` gives what stands in a network's place, by its name."""

    wrong: Change = lambda name, network: network

    def open(self) -> tuple[Checkpoint, Networks]:
        checkpoint, networks = super().open()
        by_name = {name: self.wrong(name, network) for name, network in networks.by_name.items()}
        return checkpoint, replace(networks, by_name=by_name)


@dataclass
class Changed:
    """A network with something done to what it is given, or to what it gives."""

    network: Network
    given: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda inputs: inputs
    gives: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda outputs: outputs

    @property
    def spec(self) -> NetworkSpec:
        return self.network.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.gives(self.network(self.given(inputs)))


def wrong(trial: Trial, change: Change) -> Trial:
    return Wrong(**{name: getattr(trial, name) for name in Trial.__dataclass_fields__}, wrong=change)
