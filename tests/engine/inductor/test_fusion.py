"""The rewritten blocks compute what diffusers' do, and those of a quantized denoiser what its emulation does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

from storyadapter.bench.synthetic import TOY, SyntheticCheckpoint
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.inductor.fusion import GegluFeedForward, Transformer, fuse_denoiser, prepare
from storyadapter.engine.inductor.operators import PLAIN
from storyadapter.engine.inductor.picture_fusion import Convolution, Fp8Convolution, Fp8Sampler, ResnetBlock
from storyadapter.engine.inductor.products import Fp8Geglu, Fp8Linear, Fp8Product, Linear
from storyadapter.model.contract import network_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from storyadapter.model.unet import Denoiser, split_unet
from storyadapter.quantization.layers import QuantizedLayer
from storyadapter.quantization.recipe import FP8, Recipe
from storyadapter.quantization.scales import Scales


@pytest.fixture
def denoiser(checkpoint: Checkpoint) -> Denoiser:
    return split_unet(checkpoint.load("unet", torch.float32), checkpoint.load_ip_adapter(torch.float32), grca)[
        "denoiser"
    ].eval()


@torch.no_grad()
def test_a_fused_denoiser_computes_the_same(checkpoint: Checkpoint, denoiser: Denoiser) -> None:
    spec = network_specs(checkpoint.geometry)["denoiser"]
    sizes = {"B": 3, "P": 2, "G": 2, "R": 7, "M": 1, "h": 8, "w": 12}
    inputs = tuple(example_inputs(spec, sizes, "fp32").values())
    expected = denoiser(*inputs)
    count = sum(isinstance(part, Transformer2DModel) for part in denoiser.modules())
    fuse_denoiser(denoiser, PLAIN)
    assert sum(isinstance(part, Transformer) for part in denoiser.modules()) == count > 0
    error = (denoiser(*inputs) - expected).norm() / expected.norm()
    assert error < 1e-5


@torch.no_grad()
def test_a_fused_controlnet_computes_the_same() -> None:
    checkpoint = SyntheticCheckpoint(TOY, torch.device("cpu"), controlnets=1)
    spec = network_specs(checkpoint.geometry)["controlnet_0"]
    ((_, controlnet),) = iterate_modules(checkpoint, Numerics("fp32"), grca, only=("controlnet_0",))
    inputs = tuple(example_inputs(spec, {"B": 3, "P": 2, "M": 1, "h": 8, "w": 12}, "fp32").values())
    expected = controlnet(*inputs)
    prepare(controlnet, torch.device("cpu"))
    assert sum(isinstance(part, Transformer) for part in controlnet.modules()) == 3
    for found, of_eager in zip(controlnet(*inputs), expected, strict=True):
        assert (found - of_eager).norm() / of_eager.norm() < 1e-5


@torch.no_grad()
def test_a_feed_forward_computes_the_same() -> None:
    theirs = FeedForward(8, activation_fn="geglu")
    x = torch.randn(10, 8)
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


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, (), ("*.conv1",), ("*.conv2",)])
def test_every_block_computes_the_same(
    checkpoint: Checkpoint, denoiser: Denoiser, kept: tuple[str, ...] | None
) -> None:
    """Each from what the one before it really gave: in fp8, rounding multiplies the least difference over blocks."""
    inputs, quantized = _inputs(checkpoint), kept is not None
    if kept is not None:
        recipe = Recipe(kept=(*FP8.kept, *kept))
        Scales(recipe, "model", _largest_inputs(denoiser, inputs, recipe)).apply(denoiser)
    calls: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, given, named, out: calls.update({name: (given, named, out)})

    kinds = Transformer2DModel | ResnetBlock2D | Upsample2D | Downsample2D
    for name, part in denoiser.named_modules():
        if isinstance(part, kinds):
            part.register_forward_hook(keep(name), with_kwargs=True)
    denoiser(*inputs)
    weights = prepare(denoiser, torch.device("cpu"))
    for name, (given, named, expected) in calls.items():
        out = denoiser.get_submodule(name)(*given, **named)
        out, expected = (value[0] if isinstance(value, tuple) else value for value in (out, expected))
        error = (out - expected).norm() / expected.norm()
        assert error < (1e-2 if quantized else 1e-5), name
    found = {type(part) for part in denoiser.modules()}
    assert ({Fp8Linear, Fp8Geglu, ResnetBlock, Fp8Convolution, Fp8Sampler} <= found) == quantized
    assert Transformer in found and (Linear in found) != quantized
    assert (Convolution in found) == bool(kept)
    assert (sum(value.dtype == torch.float8_e4m3fn for value in weights.values()) > 20) == quantized


@torch.no_grad()
def test_what_cannot_be_fused_in_fp8_is_told(checkpoint: Checkpoint, denoiser: Denoiser) -> None:
    scales = _largest_inputs(denoiser, _inputs(checkpoint))
    some = Recipe(kept=(*FP8.kept, "*.to_v"))
    kept = {name: scale for name, scale in scales.items() if not name.endswith(".to_v")}
    Scales(some, "model", kept).apply(denoiser)
    with pytest.raises(ValueError, match="attn1.to_v isn't quantized as others are; expected all of a transformer's"):
        fuse_denoiser(denoiser, PLAIN)
    layers = [QuantizedLayer(torch.nn.Linear(16, 16), "fp8", scale) for scale in (1.0, 2.0)]
    with pytest.raises(ValueError, match="^layers that read the same input have the scales 1, 2; expected one$"):
        Fp8Product(*layers)


def _inputs(checkpoint: Checkpoint) -> tuple[torch.Tensor, ...]:
    spec = network_specs(checkpoint.geometry)["denoiser"]
    return tuple(example_inputs(spec, {"B": 3, "P": 2, "G": 2, "R": 7, "M": 1, "h": 8, "w": 12}, "fp32").values())


def _largest_inputs(denoiser: Denoiser, inputs: tuple[torch.Tensor, ...], recipe: Recipe = FP8) -> dict[str, float]:
    """The scale of every layer's input, as calibration with one call would find it."""
    found: dict[str, float] = {}

    def measure(name: str) -> Callable[..., None]:
        return lambda _, given: found.update({name: float(given[0].abs().max()) / 448})

    hooks = [layer.register_forward_pre_hook(measure(name)) for name, layer in recipe.layers(denoiser).items()]
    denoiser(*inputs)
    for hook in hooks:
        hook.remove()
    return found
