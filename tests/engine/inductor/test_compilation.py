"""One network, compiled and stored."""

from pathlib import Path

import torch
from torch import Tensor, nn

from storyadapter import Checkpoint
from storyadapter.engine.inductor.compilation import build_network
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges, TensorSpec, network_specs
from storyadapter.model.examples import example_inputs, run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics

CPU = torch.device("cpu")
NAME = "reference_projection"
SIZE = Range(64, 64)


def transposed(checkpoint: Checkpoint) -> nn.Module:
    ((_, module),) = iterate_modules(checkpoint, Numerics("fp32"), grca, (NAME,))
    for weight in module.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.T.contiguous().T
    assert any(not weight.is_contiguous() for weight in module.parameters())
    return module


class TextAttention(nn.Module):
    """A layer's attention of one head to its prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, latents: Tensor, text_kv: Tensor) -> Tensor:
        """latents [P, 16, 8], text_kv [P, 2, T, 8] → [P, 16, 8]."""
        return nn.functional.scaled_dot_product_attention(self.to_q(latents), *text_kv.unbind(1))


def test_one_package_reads_texts_of_one_chunk_and_of_more(tmp_path: Path) -> None:
    letters = ShapeRanges(2, 8, SIZE, SIZE, 3).letters()
    tensors = (TensorSpec("latents", ("P", 16, 8)), TensorSpec("text_kv", ("P", 2, "77*M", 8)))
    spec, module = NetworkSpec("attention", tensors, (TensorSpec("out", ("P", 16, 8)),)), TextAttention().eval()
    build_network(spec, module, Numerics("fp32"), letters, tmp_path)
    network = InductorNetwork(spec, tmp_path, "fp32", CPU, letters, prepare(module, CPU))
    for chunks in (1, 2, 3):
        inputs = example_inputs(spec, {"P": 3, "M": chunks}, "fp32")
        torch.testing.assert_close(network(inputs)["out"], module(*inputs.values()).detach())


def test_weights_that_lie_transposed_are_bound_as_they_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As of a checkpoint saved by pickle, which keeps strides."""
    letters = ShapeRanges(2, 8, SIZE, SIZE).letters()
    spec = network_specs(checkpoint.geometry)[NAME]
    module = transposed(checkpoint)
    examples = run_examples(spec, module, letters, "fp32")
    built = build_network(spec, module, Numerics("fp32"), letters, tmp_path)
    assert built.relative_error < 1e-5
    weights = prepare(transposed(checkpoint), CPU)
    assert built.weight_bytes == sum(weight.nbytes for weight in weights.values())
    network = InductorNetwork(spec, tmp_path, "fp32", CPU, letters, weights)
    for example in examples:
        drawn = network(example.inputs)
        for name, expected in example.outputs.items():
            torch.testing.assert_close(drawn[name], expected)


class ChannelsLast(nn.Module):
    """A decoder of the contract's shapes, whose result lies channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 3, 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        picture = self.convolution(latents).repeat_interleave(8, 2).repeat_interleave(8, 3)
        return picture.contiguous(memory_format=torch.channels_last)


def test_outputs_are_contiguous_whatever_strides_the_code_gives_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    size = Range(64, 64)
    letters = ShapeRanges(2, 8, size, size).letters()
    spec = network_specs(checkpoint.geometry)["vae_decoder"]
    module = ChannelsLast().eval()
    build_network(spec, module, Numerics("fp32"), letters, tmp_path)
    network = InductorNetwork(spec, tmp_path, "fp32", CPU, letters, prepare(module, CPU))
    latents = torch.randn(1, 4, 8, 8)
    (of_the_code,) = network._call([latents])
    assert of_the_code.is_contiguous(memory_format=torch.channels_last) and not of_the_code.is_contiguous()
    image = network({"latents": latents})["image"]
    assert image.is_contiguous()
    torch.testing.assert_close(image, module(latents).detach())
