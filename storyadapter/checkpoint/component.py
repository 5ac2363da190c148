"""One network of the checkpoint: its configuration, its files, and the check that they fit each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.checkpoint.tensor_files import first_line, read_headers, read_tensors
from storyadapter.method.errors import CheckpointError, Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Names of a file turned into names of the network; given the empty network too. Works on the meta device.
Convert = Callable[["nn.Module", "dict[str, Tensor]"], "dict[str, Tensor]"]


@dataclass(frozen=True)
class Component:
    """One network of the checkpoint.

    Attributes:
        title: what messages call it, such as "the UNet".
        config_file: where its sizes come from.
        build: makes the network without weights; called on an empty-weights context.
        files: weights; a shard index may be among them.
        convert: from the tensors of the files to those of the network.
        prefix: only tensors whose names start with it are read: a single file holds several networks.
    """

    title: Text
    config_file: Path
    build: "Callable[[], nn.Module]"
    files: tuple[Path, ...]
    convert: Convert
    prefix: str = ""

    @property
    def tensor_files(self) -> tuple[Path, ...]:
        return tuple(path for path in self.files if path.suffix != ".json")

    def empty(self) -> "nn.Module":
        """The network with all its parameters on the meta device, in evaluation mode.

        Raises:
            CheckpointError: the configuration doesn't describe such a network.
        """
        from accelerate import init_empty_weights

        try:
            with init_empty_weights(include_buffers=False):
                return self.build().eval().requires_grad_(False)
        except Exception as error:  # anything a nonsensical configuration makes the constructors raise
            raise CheckpointError(
                f"{self.config_file} doesn't describe ", self.title, f": {first_line(error)}"
            ) from error

    def check(self) -> "nn.Module":
        """Compare names and shapes in the files' headers with the network, and return the empty network.

        Raises:
            CheckpointError: a file is corrupt, or tensors are missing, unexpected, of other shapes, or quantized.
        """
        network = self.empty()
        found: dict[str, Tensor] = {}
        for path in self.tensor_files:
            found |= {name: t for name, t in read_headers(path).items() if name.startswith(self.prefix)}
        found = self._converted(network, found)
        compare(self.where, str(self.config_file), shapes(network), found)
        return network

    def load(self, dtype: "torch.dtype", device: "torch.device | None" = None) -> "nn.Module":
        """The network on `device`, or else the CPU, its weights in `dtype`, in evaluation mode without gradients.

        Raises:
            CheckpointError: the files no longer are what was checked.
        """
        network = self.empty()
        tensors: dict[str, Tensor] = {}
        for path in self.tensor_files:
            tensors |= read_tensors(path, dtype, lambda name: name.startswith(self.prefix), device)
        tensors = self._converted(network, tensors)
        compare(self.where, str(self.config_file), shapes(network), tensors)
        network.load_state_dict(tensors, assign=True)
        return network.to(device).requires_grad_(False)  # only buffers are left to be moved

    @property
    def where(self) -> Text:
        """What messages call it, with its files."""
        first = self.tensor_files[0]
        return self.title, f" in {first.parent if len(self.tensor_files) > 1 else first}"

    def _converted(self, network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        try:
            return self.convert(network, tensors)
        except KeyError as error:  # the conversions of diffusers look some names up
            raise CheckpointError(
                self.where, f" lacks the tensor {error}", expected="a whole SDXL checkpoint"
            ) from error


def shapes(network: "nn.Module") -> dict[str, list[int]]:
    """The shape of every tensor that a network's weights must have."""
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def compare(where: Text, target: str, expected: Mapping[str, list[int]], found: "Mapping[str, Tensor]") -> None:
    """Raises CheckpointError unless `found` has exactly the expected names and shapes and is all floating point."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    reshaped = [name for name in both if expected[name] != list(found[name].shape)]
    quantized = [name for name in both if not found[name].is_floating_point()]
    faults = [_count(missing, "missing"), _count(unexpected, "unexpected")]
    if reshaped:
        name = reshaped[0]
        faults.append(_count(reshaped, "of another shape", f" is {list(found[name].shape)}, expected {expected[name]}"))
    faults.append(_count(quantized, "of whole numbers", ": a quantized checkpoint; expected fp32, fp16 or bf16"))
    if any(faults):
        raise CheckpointError(where, f" doesn't fit {target}: {'; '.join(filter(None, faults))}")


def _count(names: list[str], kind: str, note: str = "") -> str:
    if not names:
        return ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {kind} ({names[0]}{note})"


def folder_names(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Names in today's spelling.

    transformers 5.6 dropped the prefix "text_model." of `CLIPTextModel`, older files hold `position_ids`, which are no
    weights, and VAEs saved before diffusers 0.17 spell the attention's layers in another way.
    """
    prefixed = any(name.startswith("text_model.") for name in network.state_dict())
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        if not prefixed:
            name = name.removeprefix("text_model.")
        if ".mid_block.attentions." in name:
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # a 1x1 convolution of old
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                name = name.replace(f".{old}.", f".{new}.")
        result[name] = tensor
    return result
