"""A VAE that overflows in fp16 doesn't with divided activations, and draws what fp32 draws."""

import torch
from diffusers import AutoencoderKL

from storyadapter.model.modules import VaeDecoder
from storyadapter.model.vae_scaling import divide_activations


def vae_that_grows(times: float, force_upcast: bool = True) -> AutoencoderKL:
    """Its stream of residuals is as large as `times`."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.5,
        force_upcast=force_upcast,
    ).eval()
    vae.decoder.conv_in.weight.data *= times
    for name, weight in vae.decoder.named_parameters():
        if "conv2" in name or "conv1" in name:
            weight.data *= times / 8
    return vae


@torch.no_grad()
def test_division_changes_nothing_in_real_numbers() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    vae = vae_that_grows(10).double()
    expected = vae.decode(latents.double() / 0.5).sample
    divide_activations(vae.decoder, 64)
    found = vae.decode(latents.double() / 0.5).sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_overflows_in_fp16_does_no_more_where_the_vae_says_so() -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = VaeDecoder(vae_that_grows(2e5))(latents)
    found = VaeDecoder(vae_that_grows(2e5).half())(latents.half())
    assert (found.float() - expected).norm() / expected.norm() < 1e-2
    spoilt = VaeDecoder(vae_that_grows(2e5, force_upcast=False).half())(latents.half())
    assert not spoilt.isfinite().all()
