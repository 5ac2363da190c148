"""The rewritten decoder of a VAE decodes as the one it was made from."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from storyadapter.engine.inductor.operators import PLAIN
from storyadapter.engine.inductor.picture_fusion import ResnetBlock
from storyadapter.engine.inductor.vae_fusion import NormAndSilu, PictureAttention, fuse_vae
from storyadapter.model.modules import VaeDecoder


def decoder(*channels: int) -> VaeDecoder:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=8,
        latent_channels=4,
    ).eval()
    for weight in vae.decoder.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    return VaeDecoder(vae)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "left"), [((32, 32, 64), 0), ((24, 32), 2)])
def test_it_decodes_the_same(channels: tuple[int, ...], left: int) -> None:
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    vae = decoder(*channels)
    expected = vae(latents)
    fuse_vae(vae, PLAIN)
    assert (vae(latents) - expected).norm() / expected.norm() < 1e-5
    kinds = [type(part) for part in vae.modules()]
    assert kinds.count(ResnetBlock2D) == left and kinds.count(Attention) == 0
    assert kinds.count(PictureAttention) == 1 and ResnetBlock in kinds
    assert (NormAndSilu in kinds) == (channels[0] % 16 == 0)


def test_an_attention_of_several_heads_is_refused() -> None:
    vae = decoder(32, 32)
    vae.decoder.mid_block.attentions[0].heads = 2
    with pytest.raises(ValueError, match="isn't of SDXL's kind; expected one head, a group norm and a residual"):
        fuse_vae(vae, PLAIN)
