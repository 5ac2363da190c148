"""The VAE's attention in parts is that of diffusers."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention

from storyadapter.bench.synthetic import SyntheticCheckpoint
from storyadapter.bench.synthetic_models import TOY
from storyadapter.engine.inductor.vae_attention import PictureAttention, fuse_vae
from storyadapter.modules import VaeDecoder


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    checkpoint = SyntheticCheckpoint(TOY, torch.device("cpu"))
    return VaeDecoder(checkpoint.load_vae(torch.float32)).eval()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 4), (2, 8, 12), (1, 20, 4)])
def test_it_decodes_the_same(decoder: VaeDecoder, frames: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    latents = torch.randn(frames, 4, height, width)
    fused = copy.deepcopy(decoder)
    fuse_vae(fused)
    with torch.inference_mode():
        expected, found = decoder(latents), fused(latents)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert any(isinstance(part, PictureAttention) for part in fused.modules())
    assert not any(isinstance(part, Attention) for part in fused.modules())


def test_positions_matter(decoder: VaeDecoder) -> None:
    """So that the comparison would see parts of the queries that are joined in another order."""
    attention = next(part for part in decoder.modules() if isinstance(part, Attention))
    x = torch.randn(1, attention.to_q.in_features, 8, 4)
    with torch.inference_mode():
        out = PictureAttention(attention)(x)
        assert not torch.allclose(out, out.flatten(2).roll(4, 2).view_as(out), atol=0.1)


def test_another_attention_is_refused(decoder: VaeDecoder) -> None:
    other = copy.deepcopy(decoder)
    attention = next(part for part in other.modules() if isinstance(part, Attention))
    attention.heads = 2
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0 isn't the attention of SDXL's VAE"):
        fuse_vae(other)
