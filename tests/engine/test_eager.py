"""The backend that is the reference, in the precisions it can have."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from storyadapter.checkpoint.paths import CheckpointPaths
from storyadapter.demo.shipped import MODEL
from storyadapter.demo.training.dataset import mixed_scenes
from storyadapter.demo.training.scenes import draw
from storyadapter.engine.opening import open_networks
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.runtime.pictures import decode_latents


@pytest.fixture(scope="module")
def latents(demo_checkpoint: Checkpoint) -> Tensor:
    """Six pictures of the demo's world as the sampler would leave them: [6, 4, 16, 16] fp32."""
    pictures = np.stack([np.asarray(draw(scene)) for scene in mixed_scenes(6, seed=0)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = demo_checkpoint.load("vae", torch.float32)
    with torch.inference_mode():
        return vae.encode(pixels).latent_dist.mean.contiguous() * vae.config.scaling_factor


@pytest.fixture(scope="module")
def decoded(demo_checkpoint: Checkpoint, latents: Tensor):
    """The pictures that the demo's VAE decodes in a precision, the other networks being in fp32."""

    @cache
    def decode(precision: Precision) -> list[np.ndarray]:
        networks = open_networks(
            demo_checkpoint, backend="eager", numerics=Numerics.of("fp32", vae_decoder=precision), device="cpu"
        )
        pictures, finite = decode_latents(networks, latents)
        assert finite.all()
        return list(pictures.numpy().astype(np.float64))

    return decode


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(picture - reference).mean())


# Measured: 51.5 to 53.2 dB in bf16 and 63.2 to 64.2 dB in fp16. A VAE that stayed in fp32 would be equal; the wrong
# weights, or bf16 arithmetic of another kind, would be far below.
@pytest.mark.parametrize(("precision", "least", "most"), [("bf16", 50, 56), ("fp16", 61, 68)])
def test_a_vae_in_half_precision_decodes_nearly_the_same(
    decoded, precision: Precision, least: float, most: float
) -> None:
    values = [psnr(*pair) for pair in zip(decoded(precision), decoded("fp32"), strict=True)]
    assert least <= min(values) and max(values) <= most


def test_the_vaes_precision_is_its_own(demo_checkpoint: Checkpoint, latents: Tensor) -> None:
    def dtypes(networks: Networks) -> tuple[torch.dtype, ...]:
        loaded = (networks["denoiser"], networks["image_encoder"], networks["vae_decoder"])
        return tuple(next(network.module.parameters()).dtype for network in loaded)

    numerics = Numerics.of("fp16", vae_decoder="bf16")
    networks = open_networks(demo_checkpoint, backend="eager", numerics=numerics, device="cpu")
    assert dtypes(networks) == (torch.float16, torch.float16, torch.bfloat16)
    assert (networks.numerics, networks.dtype("vae_decoder")) == (numerics, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^vae_decoder: input latents is torch.float16; expected torch.bfloat16$"):
        networks["vae_decoder"]({"latents": latents.half()})
    assert demo_checkpoint.geometry.vae_in_fp32 is False
    by_default = open_networks(
        demo_checkpoint, backend="eager", numerics=demo_checkpoint.geometry.numerics("bf16"), device="cpu"
    )
    assert dtypes(by_default) == (torch.bfloat16,) * 3


def test_a_vae_that_asks_for_fp32_gets_it_by_default(demo_checkpoint: Checkpoint, tmp_path) -> None:
    """`force_upcast` in the configuration, as in SDXL's own VAE."""
    config = (MODEL / "vae" / "config.json").read_text()
    assert '"force_upcast": false' in config
    for item in MODEL.iterdir():
        if item.name != "vae":
            (tmp_path / item.name).symlink_to(item)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(config.replace('"force_upcast": false', '"force_upcast": true'))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "vae" / weights).symlink_to(MODEL / "vae" / weights)
    own = Checkpoint.open(CheckpointPaths(tmp_path, tmp_path / "image_encoder", tmp_path / "ip-adapter.safetensors"))
    for asked, given in ((None, "fp32"), ("bf16", "bf16")):
        networks = open_networks(own, backend="eager", numerics=own.geometry.numerics("fp16", asked), device="cpu")
        assert networks.numerics["vae_decoder"] == given
