"""The builder's own account of an engine: layers, inputs and outputs, and which attentions became one kernel.

Read from the `Layers:` message that TensorRT's builder writes at `ProfilingVerbosity.DETAILED`, since an engine for
another GPU can't be opened on the machine that built it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

HEADER: Final = "Layers:"
_LAYER: Final = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: .*?Metadata: (?P<metadata>.*)$")
_TENSOR: Final = re.compile(
    r"^ ?Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), Dimensions: \[(?P<dims>[-\d,]*)\].*"
    r"ProfileInfo: \[(?P<profiles>.*)\]$"
)
_SHAPES: Final = re.compile(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]")
_NODE: Final = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_FUSED: Final = re.compile(r"mha")  # _gemm_mha_v2 in TensorRT-RTX, fmha_… in TensorRT


@dataclass(frozen=True)
class Layer:
    """One layer of the built engine; `nodes` are the ONNX nodes that went into it."""

    name: str
    type: str
    nodes: tuple[str, ...]

    @property
    def is_fused_attention(self) -> bool:
        """Whether this is an attention kernel: scores, softmax and values in one."""
        return self.type != "gemm" and _FUSED.search(self.name) is not None


@dataclass(frozen=True)
class BoundTensor:
    """An input or output: `shape` with -1 where it is dynamic; `profiles` are (min, opt, max) shapes of an input."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class EngineLayers:
    """What the builder says it built."""

    layers: tuple[Layer, ...]
    tensors: tuple[BoundTensor, ...]


def parse_layers(text: str) -> EngineLayers:
    """Read the builder's `Layers:` message. Raises ValueError: it holds no layers, or a line of another form."""
    layers, tensors = [], []
    for line in text.splitlines():
        if match := _TENSOR.match(line):
            shapes = tuple(tuple(_sizes(part) for part in found) for found in _SHAPES.findall(match["profiles"]))
            tensors.append(
                BoundTensor(match["name"], match["mode"] == "Input", match["dtype"], _sizes(match["dims"]), shapes)
            )
        elif match := _LAYER.match(line):
            layers.append(Layer(match["name"], match["type"], tuple(_NODE.findall(match["metadata"]))))
        elif line.startswith("Name: "):
            raise ValueError(f"not a layer as TensorRT's builder writes them: {line[:120]}")
    if not layers:
        raise ValueError("the builder's message names no layers")
    return EngineLayers(tuple(layers), tuple(tensors))


def fused_attentions(layers: Iterable[Layer]) -> int:
    """How many layers are fused attention kernels."""
    return sum(layer.is_fused_attention for layer in layers)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
