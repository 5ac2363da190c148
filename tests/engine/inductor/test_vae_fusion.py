"""The rewritten decoder of a VAE decodes as the one it was made from."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from storyadapter.bench.vae import largest_inputs
from storyadapter.engine.inductor.operators import PLAIN, operators_for
from storyadapter.engine.inductor.picture_fusion import Fp8Convolution, Fp8Sampler, ResnetBlock
from storyadapter.engine.inductor.vae_fusion import NormAndSilu, PictureAttention, fuse_vae
from storyadapter.model.modules import VaeDecoder
from storyadapter.quantization.layers import QuantizedLayer
from storyadapter.quantization.recipe import VAE_FP8
from storyadapter.quantization.scales import Scales


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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_one_computes_what_its_emulation_does(dtype: torch.dtype) -> None:
    """Each block from what the one before it really gave: rounding multiplies the least difference over blocks."""
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    vae = decoder(32, 32, 64).to(dtype)
    scales = Scales(VAE_FP8, "model", largest_inputs(vae, VAE_FP8, latents))
    scales.apply(vae)
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, given, out: calls.update({name: (given[0], out)})

    for name, part in vae.named_modules():
        if isinstance(part, ResnetBlock2D | Upsample2D):
            part.register_forward_hook(keep(name))
    emulated = vae(latents)
    fuse_vae(vae, PLAIN)
    for name, (given, expected) in calls.items():
        block = vae.get_submodule(name)
        assert isinstance(block, ResnetBlock | Fp8Sampler)
        out = block(given)
        assert out.dtype == dtype and (out - expected).norm() / expected.norm() < (
            1e-4 if dtype.itemsize == 4 else 2e-2
        )
    kinds = [type(part) for part in vae.modules()]
    assert kinds.count(Fp8Convolution) == len(scales.inputs) and QuantizedLayer not in kinds
    assert kinds.count(Fp8Sampler) == 2 and kinds.count(Upsample2D) == 0
    assert (vae(latents) - emulated).norm() / emulated.norm() < 0.1
    for part in vae.modules():  # the inputs' scales are read
        if isinstance(part, Fp8Convolution):
            part.factor *= 64
    assert (vae(latents) - emulated).norm() / emulated.norm() > 0.3


@torch.no_grad()
def test_with_the_kernels_a_quantized_one_is_exported_for_every_size() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    vae, latents = decoder(32, 32, 64).to(torch.bfloat16), torch.randn(1, 4, 8, 12).bfloat16()
    scales = Scales(VAE_FP8, "model", largest_inputs(vae, VAE_FP8, latents))
    scales.apply(vae)
    fuse_vae(vae, operators_for(torch.device("cuda")))
    sides = {axis: torch.export.Dim(name, min=4, max=256) for axis, name in ((2, "h"), (3, "w"))}
    program = torch.export.export(vae.to("meta"), (latents.to("meta"),), dynamic_shapes=(sides,), strict=False)
    assert [(int(found.lower), int(found.upper)) for found in program.range_constraints.values()] == [(4, 256)] * 2
    called = [str(node.target).removesuffix(".default") for node in program.graph.nodes]
    assert called.count("storyadapter.convolution_fp8_triton") == len(scales.inputs)
    norms = len([part for part in vae.modules() if isinstance(part, torch.nn.GroupNorm)])
    assert called.count("storyadapter.group_norm_triton") == norms


def test_convolutions_of_residual_blocks_and_upsamplers_are_quantized() -> None:
    names = VAE_FP8.layers(decoder(32, 32, 64))
    assert {name.rpartition(".")[2] for name in names} == {"conv1", "conv2", "conv"}
    assert all(".resnets." in name or ".upsamplers." in name for name in names)
    blocks = [part for part in decoder(32, 32, 64).modules() if isinstance(part, ResnetBlock2D | Upsample2D)]
    assert len(names) == sum(2 if isinstance(block, ResnetBlock2D) else 1 for block in blocks)
    # of latents as wide as kernels take them, the ends stay too
    wide = AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",),
        down_block_types=("DownEncoderBlock2D",),
        block_out_channels=(32,),
        norm_num_groups=8,
        latent_channels=16,
        out_channels=16,
    )
    assert all(".resnets." in name for name in VAE_FP8.layers(VaeDecoder(wide)))


def test_an_attention_of_several_heads_is_refused() -> None:
    vae = decoder(32, 32)
    vae.decoder.mid_block.attentions[0].heads = 2
    with pytest.raises(ValueError, match="isn't of SDXL's kind; expected one head, a group norm and a residual"):
        fuse_vae(vae, PLAIN)
