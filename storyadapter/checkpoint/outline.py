"""What a network of a configuration consists of, as diffusers and transformers make it: tensors and their shapes."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from storyadapter.checkpoint.remembered import digest_of, remembered

if TYPE_CHECKING:
    from torch import nn

# Written by the libraries beside what they describe; no code depends on it.
_NOTES: Final = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Outline:
    """A network without its weights, as plain data.

    Attributes:
        config: the settings that its code depends on, defaults filled in.
        shapes: of every tensor of its state by name, in order.
        attentions: of a network of diffusers, the names of its attention layers and their heads, in the order of
            `attn_processors`.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    attentions: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, network: Any) -> "Outline":
        """Of a network of diffusers or transformers."""
        names = [name.removesuffix(".processor") for name in getattr(network, "attn_processors", ())]
        return cls(
            settings(network.config),
            {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
            tuple((name, network.get_submodule(name).heads) for name in names),
        )


def outline_of(kind: str, config: Mapping[str, Any]) -> Outline:
    """What such a network consists of: remembered, or seen by making it.

    Args:
        kind: its class in diffusers or transformers.

    Raises:
        Exception: whatever the class makes of a configuration that describes none.
    """

    def make() -> dict[str, Any]:
        return asdict(Outline.of(empty_network(kind, config)))

    found = remembered("outline", digest_of(kind, dict(config)), make)
    return Outline(found["config"], found["shapes"], tuple((name, heads) for name, heads in found["attentions"]))


def defaults_of(kind: str) -> dict[str, Any]:
    """What a class of diffusers takes, and what it is if a configuration doesn't say it."""

    def make() -> dict[str, Any]:
        import diffusers

        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name != "self"}

    return remembered("defaults", digest_of(kind), make)


def empty_network(kind: str, config: Mapping[str, Any]) -> "nn.Module":
    """The network with all its parameters on the meta device, in evaluation mode, without gradients.

    Raises:
        Exception: whatever the class makes of a configuration that describes none.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        return _make(kind, dict(config)).eval().requires_grad_(False)


def _make(kind: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    if hasattr(diffusers, kind):
        return getattr(diffusers, kind).from_config(config)
    configuration = "CLIPVisionConfig" if "Vision" in kind else "CLIPTextConfig"
    return getattr(transformers, kind)(getattr(transformers, configuration).from_dict(config))


def settings(config: Any) -> dict[str, Any]:
    """What a network's code depends on, of the configuration of diffusers or transformers."""
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in _NOTES}
