"""The rewritten transformers compute what diffusers' do."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.inductor.fusion import PLAIN, GegluFeedForward, Transformer, fuse_denoiser
from storyadapter.model.contract import network_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.grca import grca
from storyadapter.model.unet import Denoiser, split_unet


@pytest.fixture
def denoiser(checkpoint: Checkpoint) -> Denoiser:
    return split_unet(checkpoint.load_unet(torch.float32), checkpoint.load_ip_adapter(torch.float32), grca)[
        "denoiser"
    ].eval()


@torch.no_grad()
def test_a_fused_denoiser_computes_the_same(checkpoint: Checkpoint, denoiser: Denoiser) -> None:
    spec = network_specs(checkpoint.geometry)["denoiser"]
    sizes = {"B": 3, "P": 2, "G": 2, "R": 7, "h": 8, "w": 12}
    inputs = tuple(example_inputs(spec, sizes, "fp32").values())
    expected = denoiser(*inputs)
    count = sum(isinstance(part, Transformer2DModel) for part in denoiser.modules())
    fuse_denoiser(denoiser, PLAIN)
    assert sum(isinstance(part, Transformer) for part in denoiser.modules()) == count > 0
    error = (denoiser(*inputs) - expected).norm() / expected.norm()
    assert error < 1e-5


@torch.no_grad()
def test_a_feed_forward_computes_the_same() -> None:
    theirs = FeedForward(8, activation_fn="geglu")
    x = torch.randn(2, 5, 8)
    assert torch.allclose(GegluFeedForward(theirs, PLAIN)(x), theirs(x), atol=1e-6)
    swapped = FeedForward(8, activation_fn="geglu")
    swapped.load_state_dict(theirs.state_dict())
    swapped.net[0].proj.weight.data = swapped.net[0].proj.weight.data.roll(len(swapped.net[0].proj.weight) // 2, 0)
    assert not torch.allclose(GegluFeedForward(swapped, PLAIN)(x), theirs(x), atol=1e-3)


def test_another_kind_of_transformer_is_refused_by_name(denoiser: Denoiser) -> None:
    name, model = next((n, m) for n, m in denoiser.named_modules() if isinstance(m, Transformer2DModel))
    model.use_linear_projection = False
    with pytest.raises(ValueError, match=f"^{name} isn't a transformer of SDXL's kind; expected linear projections"):
        fuse_denoiser(denoiser, PLAIN)
