"""Networks of the few-step modes, compiled on a GPU: a denoiser that takes the guidance, and a VAE with fused norms."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storyadapter.bench.synthetic import TOY, TOY_LCM, SyntheticCheckpoint
from storyadapter.engine.inductor.compilation import build_network
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.engine.inductor.vae_fusion import NormAndSilu
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.runtime.denoising import guidance_embedding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
LETTERS = ShapeRanges(2, 4, Range(64, 64), Range(64, 64)).letters()


def built(checkpoint: SyntheticCheckpoint, name: str, precision: Precision, folder: Path) -> InductorNetwork:
    """A network, compiled; the build compares it with eager."""
    # loaded twice: the memory of the weights that a build compares with is given back
    first, second = (
        next(iterate_modules(checkpoint, Numerics(precision), grca, (name,), DEVICE))[1] for _ in ("build", "open")
    )
    spec = network_specs(checkpoint.geometry)[name]
    build_network(spec, first, Numerics(precision), LETTERS, folder)
    return InductorNetwork(spec, folder, precision, DEVICE, LETTERS, prepare(second, DEVICE))


def test_a_denoiser_reads_the_guidance_that_it_takes_as_an_embedding(tmp_path: Path) -> None:
    checkpoint = SyntheticCheckpoint(TOY_LCM, DEVICE)
    network = built(checkpoint, "denoiser", "fp16", tmp_path)
    inputs = example_inputs(network.spec, {"B": 2, "P": 2, "G": 2, "R": 4, "M": 1, "h": 8, "w": 8}, "fp16")
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}

    def noise(guidance: float) -> torch.Tensor:
        width = checkpoint.geometry.guidance_embedding
        embedding = guidance_embedding(torch.tensor([guidance, guidance]), width).to(DEVICE, torch.float16)
        return network({**inputs, "time_condition": embedding})["noise"].float()

    assert torch.equal(noise(8), noise(8))
    assert (noise(8) - noise(5)).norm() / noise(8).norm() > 1e-3


def test_a_tiny_vae_decodes_what_fp32_does(tmp_path: Path) -> None:
    checkpoint = SyntheticCheckpoint(TOY, DEVICE, reference_vae=True)  # of the published sizes
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ((_, plain),) = iterate_modules(checkpoint, Numerics("fp32"), grca, ("reference_decoder",), DEVICE)
    with torch.inference_mode():
        expected = plain(latents)
    found = built(checkpoint, "reference_decoder", "fp16", tmp_path)({"latents": latents.half()})["image"]
    assert (found.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_vae_with_fused_norms_decodes_what_fp32_does(precision: Precision, tmp_path: Path) -> None:
    model = replace(TOY, vae={**TOY.vae, "block_out_channels": (32, 32, 64, 64)})
    checkpoint = SyntheticCheckpoint(model, DEVICE)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ((_, plain),) = iterate_modules(checkpoint, Numerics("fp32"), grca, ("vae_decoder",), DEVICE)
    with torch.inference_mode():
        expected = plain(latents)
    network = built(checkpoint, "vae_decoder", precision, tmp_path)
    found = network({"latents": latents.to(torch.float16 if precision == "fp16" else torch.bfloat16)})["image"]
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if precision == "fp16" else 6e-2)
    prepare(plain, DEVICE)
    assert isinstance(plain.decoder.conv_norm_out, NormAndSilu)
