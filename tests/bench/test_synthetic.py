"""Models of random weights: SDXL weight for weight, and a toy whose pictures depend on all that they should."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from storyadapter import Story, StoryPipeline
from storyadapter.bench.synthetic import MODELS, PREDICTION_TYPE, SDXL, TOY, SyntheticCheckpoint, SyntheticModel
from storyadapter.checkpoint.ip_adapter import cross_attentions
from storyadapter.checkpoint.outline import Outline
from storyadapter.engine.eager.networks import open_eager
from storyadapter.method import constants
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.model.contract import LayerWidth
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics
from tests.engine.engine_requests import identify

CPU = torch.device("cpu")


def _count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def test_the_structure_is_sdxls() -> None:
    """The published numbers of weights."""
    checkpoint = SyntheticCheckpoint(SDXL, torch.device("meta"))
    assert _count(checkpoint.load("unet", torch.float16)) == 2_567_463_684
    assert _count(checkpoint.load("text_encoder", torch.float16)) == 123_060_480
    assert _count(checkpoint.load("text_encoder_2", torch.float16)) == 694_659_840
    assert _count(checkpoint.load("image_encoder", torch.float16)) == 1_844_907_264
    assert _count(checkpoint.load("vae", torch.float16)) == 83_653_863
    assert _count(checkpoint.load("reference_vae", torch.float16)) == 2_445_063


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_geometry_is_that_of_the_networks(model: SyntheticModel) -> None:
    checkpoint, geometry = SyntheticCheckpoint(model, torch.device("meta")), model.geometry
    unet, adapter = checkpoint.load("unet", torch.float32), checkpoint.load_ip_adapter(torch.float32)
    layers = cross_attentions(Outline.of(unet))
    counts = Counter((layer.channels, layer.heads) for layer in layers)
    assert tuple(LayerWidth(c, count, heads) for (c, heads), count in sorted(counts.items())) == geometry.widths
    assert [(layer.module, len(layer.to_k), len(layer.to_v)) for layer in adapter.layers] == [
        (layer.module, layer.channels, layer.channels) for layer in layers
    ]
    assert geometry.time_embedding == unet.time_embedding.linear_2.out_features
    assert geometry.sample_size == unet.config.sample_size
    assert adapter.projection_weight.shape[1] == geometry.image_embedding_width
    first, second, image, vae = (
        checkpoint.load(part, torch.float32).config
        for part in ("text_encoder", "text_encoder_2", "image_encoder", "vae")
    )
    assert (geometry.text_width, geometry.text_width_2) == (first.hidden_size, second.hidden_size)
    assert geometry.text_width + geometry.text_width_2 == unet.config.cross_attention_dim
    assert (geometry.pooled_width, geometry.image_embedding_width) == (second.projection_dim, image.projection_dim)
    assert geometry.pixels_per_latent == 2 ** (len(vae.block_out_channels) - 1)
    assert geometry.vae_in_fp32 is vae.force_upcast
    assert geometry.guidance_embedding == (unet.config.time_cond_proj_dim or 0)


def test_a_seed_gives_the_same_weights_in_every_precision() -> None:
    one, other = (SyntheticCheckpoint(TOY, CPU, seed).load("unet", torch.float32).state_dict() for seed in (3, 4))
    half = SyntheticCheckpoint(TOY, CPU, 3).load("unet", torch.float16).state_dict()
    assert all(torch.equal(weight.half(), half[name]) for name, weight in one.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in one.items())


def test_an_engines_identity_knows_model_and_seed() -> None:
    first, again, other = (
        identify(SyntheticCheckpoint(TOY, CPU, seed), "onnxruntime", Numerics("fp32")) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.fixture(scope="module")
def networks() -> Networks:
    return open_eager(SyntheticCheckpoint(TOY, CPU), Numerics("fp32"), CPU, lambda name: None)


def _draw(networks: Networks, **changes: object) -> Tensor:
    """The last frames of a small story, uint8 [3, 64, 64, 3]."""
    import numpy as np

    settings = {"height": 64, "width": 64, "seed": 1, "scales": (0.4,), "steps": 4, "prediction_type": PREDICTION_TYPE}
    plan = RunPlan(**{**settings, **changes})
    pipeline = StoryPipeline(networks, SyntheticCheckpoint(TOY, CPU).load_tokenizers())
    story = Story(("a fox runs", "an owl sleeps", "a boat"), style="none")
    drawn = [event for event in pipeline.run(story, plan) if isinstance(event, FrameFinished)]
    return torch.stack([torch.from_numpy(np.array(event.picture)) for event in drawn[-3:]])


def _differ(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


def test_pictures_are_neither_flat_nor_saturated_and_depend_on_what_they_should(networks: Networks) -> None:
    drawn = _draw(networks)
    assert drawn.float().std() > 20
    assert ((drawn == 0) | (drawn == 255)).float().mean() < 0.2
    assert torch.equal(drawn, _draw(networks))
    assert _differ(drawn, _draw(networks, scales=(0.2,))) > 2
    assert _differ(drawn, _draw(networks, guidance=3.0)) > 2
    assert _differ(drawn, _draw(networks, negative_prompt="")) > 1
    assert _differ(drawn[:1], drawn[1:2]) > 2


def test_activations_stay_far_from_the_limit_of_fp16_over_sdxls_depth() -> None:
    """A UNet of SDXL's 70 transformer layers, made narrow."""
    width = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 64}
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    narrow = replace(TOY, unet={**SDXL.unet, **width, **sizes})
    unet = SyntheticCheckpoint(narrow, CPU).load("unet", torch.float32)
    largest: list[float] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            largest.append(float(output.abs().max()))

    for module in unet.modules():
        module.register_forward_hook(note)
    generator = torch.Generator().manual_seed(0)
    added: Mapping[str, Tensor] = {
        "text_embeds": torch.randn(1, 32, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    hidden = torch.randn(1, constants.TEXT_TOKENS, 64, generator=generator)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.inference_mode():
        output = unet(latents, 500, hidden, added_cond_kwargs=dict(added)).sample
    assert max(largest) < 100
    assert 0.1 < float(output.std()) < 2
