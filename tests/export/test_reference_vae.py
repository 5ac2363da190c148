"""The tiny VAE's decoder, exported and compiled, computes what eager computes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.inductor.compilation import build_network
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.export.onnx_export import export_compared
from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics, Precision
from tests.reference_vaes import write_reference_vae
from tests.storyadapter.checkpoint.spoil import tiny_paths

NAME = "reference_decoder"
LETTERS = ShapeRanges(4, 6, Range(64, 96), Range(64, 128)).letters()


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny_paths(tiny_model_dir, reference_vae=write_reference_vae(tmp_path / "tiny")))


def decoder(checkpoint: Checkpoint, precision: Precision = "fp32") -> tuple[NetworkSpec, nn.Module]:
    ((name, module),) = iterate_modules(checkpoint, Numerics(precision), grca, only=(NAME,))
    return network_specs(checkpoint.geometry)[name], module


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 4e-2)])
def test_exported(checkpoint: Checkpoint, tmp_path: Path, precision: Precision, most: float) -> None:
    spec, module = decoder(checkpoint, precision)
    _, error = export_compared(spec, module, LETTERS, precision, tmp_path)
    assert error < most


def test_compiled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """For one frame at a time, as the VAE's decoder."""
    spec, module = decoder(checkpoint)
    built = build_network(spec, module, Numerics("fp32"), LETTERS, tmp_path)
    assert built.relative_error < 1e-5
    _, module = decoder(checkpoint)
    latents = torch.randn(3, 4, 12, 8, generator=torch.manual_seed(0))
    with torch.inference_mode():
        expected = module(latents)
    network = InductorNetwork(
        spec, tmp_path, "fp32", torch.device("cpu"), LETTERS, prepare(module, torch.device("cpu"))
    )
    torch.testing.assert_close(network({"latents": latents})["image"], expected, rtol=1e-4, atol=1e-5)
