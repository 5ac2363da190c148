"""The walk over a model's networks that a session makes when it opens an engine."""

from collections.abc import Callable
from typing import TypeVar

from storyadapter.model.contract import Geometry, NetworkSpec, network_specs

Loaded = TypeVar("Loaded")


def load_each(
    geometry: Geometry, load: Callable[[NetworkSpec], Loaded], on_progress: Callable[[str], None]
) -> dict[str, Loaded]:
    """What `load` gives for each of the seven networks, by name; `on_progress` gets each name before it is loaded."""
    loaded = {}
    for name, spec in network_specs(geometry).items():
        on_progress(name)
        loaded[name] = load(spec)
    return loaded
