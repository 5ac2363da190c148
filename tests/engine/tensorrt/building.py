"""What the tests build with TensorRT-RTX, and for what."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor, nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.identity import EngineIdentity
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.model.contract import Dim, NetworkSpec, Range, ShapeRanges, TensorSpec, size_of, split_dim
from storyadapter.model.unet import CrossAttentionInputs, GlobalReferenceCrossAttention

TARGETS = ("sm89", "sm120")
RANGES = ShapeRanges(4, 6, Range(64, 96), Range(64, 128))
# A size of its own profile: 96 wide, 64 high.
OPTIONS = BuildOptions(resolutions=((64, 96),), targets=TARGETS)
LETTERS = RANGES.letters()


def built_size(dim: Dim) -> int:
    """A dimension as an engine for these ranges has it: -1 where it is dynamic."""
    if isinstance(dim, int):
        return dim
    value = LETTERS[split_dim(dim)[1]]
    return -1 if value.minimum < value.maximum else size_of(dim, {split_dim(dim)[1]: value.minimum})


@dataclass(frozen=True)
class Built:
    """A finished build of the demo model, or of one with more."""

    checkpoint: Checkpoint
    identity: EngineIdentity
    store: EngineStore
    engine: StoredEngine
    stages: tuple[tuple[str, str], ...]
    fractions: tuple[tuple[str, float], ...]

    def text(self, network: str) -> str:
        return (self.engine.folder / f"{network}.layers").read_text()


class LayerBlock(nn.Module):
    """One ResNet block and one transformer block of SDXL's UNet, with the inputs of the contract's denoiser."""

    def __init__(self, block: nn.Module, attention: GlobalReferenceCrossAttention) -> None:
        super().__init__()
        self.block = block
        self.channels = attention.channels

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        text_kv: Tensor,
        text_row: Tensor,
        ref_kv: Tensor,
        ref_row: Tensor,
        ref_length: Tensor,
    ) -> Tensor:
        inputs = CrossAttentionInputs({self.channels: text_kv}, text_row, {self.channels: ref_kv}, ref_row, ref_length)
        return self.block(hidden, embedding, encoder_hidden_states=inputs)[0]


def layer_block_spec(channels: int) -> NetworkSpec:
    """Inputs and outputs of a `LayerBlock`."""
    return NetworkSpec(
        f"block_{channels}",
        (
            TensorSpec("hidden", ("B", channels, "h", "w")),
            TensorSpec("embedding", ("B", 1280)),
            TensorSpec("text_kv", (1, "P", 2, 77, channels)),
            TensorSpec("text_row", ("B",), "int32"),
            TensorSpec("ref_kv", (1, "G", 2, "R", channels)),
            TensorSpec("ref_row", ("B",), "int32"),
            TensorSpec("ref_length", ("G",), "int32"),
        ),
        (TensorSpec("out", ("B", channels, "h", "w")),),
    )


def small_onnx(folder: Path, op_type: str, other: np.ndarray | None = None) -> Path:
    """A network `y = op_type(x)` or `op_type(x, other)` with one node named "culprit", x and y [B, 8] fp16."""
    from onnx import TensorProto, helper, numpy_helper, save

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", 8]) for name in ("x", "y")]
    constants = [] if other is None else [numpy_helper.from_array(other, "other")]
    node = helper.make_node(op_type, ["x", *(constant.name for constant in constants)], ["y"], name="culprit")
    graph = helper.make_graph([node], "small", value[:1], value[1:], constants)
    path = folder / "small.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


_TENSOR: Final = re.compile(
    r"^ ?Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), Dimensions: \[(?P<dims>[-\d,]*)\].*"
    r"ProfileInfo: \[(?P<profiles>.*)\]$"
)
_SHAPES: Final = re.compile(r"MinShape: \[([\d,]*)\], OptShape: \[([\d,]*)\], MaxShape: \[([\d,]*)\]")


@dataclass(frozen=True)
class BoundTensor:
    """An input or output: `shape` with -1 where it is dynamic; `profiles` are (min, opt, max) shapes of an input."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...]


def bound_tensors(text: str) -> tuple[BoundTensor, ...]:
    """Inputs and outputs, of the message in which the builder lists the layers."""
    found = filter(None, map(_TENSOR.match, text.splitlines()))
    return tuple(
        BoundTensor(
            match["name"],
            match["mode"] == "Input",
            match["dtype"],
            _sizes(match["dims"]),
            tuple(tuple(_sizes(part) for part in shapes) for shapes in _SHAPES.findall(match["profiles"])),
        )
        for match in found
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
