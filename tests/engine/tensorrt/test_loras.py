"""LoRAs in engines: part of the key, and in the weights of what is built."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from storyadapter.checkpoint import Checkpoint
from storyadapter.checkpoint.paths import LoraSpec
from storyadapter.engine.identity import engine_key
from storyadapter.engine.opening import build_engine
from storyadapter.engine.store import EngineStore
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.export import onnx_name
from storyadapter.export.verify import open_session
from storyadapter.method.errors import EngineMismatchError
from storyadapter.model.contract import network_specs
from storyadapter.model.examples import run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import TextEncoder
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.model.unet import split_unet
from tests.engine.engine_requests import identify
from tests.engine.tensorrt.building import LETTERS, RANGES, TARGETS, Built

pytest.importorskip("tensorrt_rtx")

FOR_BOTH = BuildOptions(targets=TARGETS)

RANK = 4
SCALES = (0.5, -0.8)
# One layer in each of two networks of the contract: text_encoder, and of the UNet what text_projection takes over.
LAYERS = {
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
    "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
}
Matrices = Mapping[str, tuple[Tensor, Tensor]]  # of a layer, by its network: down [rank, in], up [out, rank]


def layer_of(checkpoint: Checkpoint, network: str) -> tuple[nn.Module, nn.Module]:
    """A network in fp32, and its layer of LAYERS."""
    module = checkpoint.load(network, torch.float32)
    layers = dict(module.named_modules())
    name = LAYERS[network]
    return module, layers[name if name in layers else name.removeprefix("text_model.")]


@pytest.fixture(scope="module")
def matrices(demo_checkpoint: Checkpoint) -> tuple[Matrices, Matrices]:
    """Of two LoRAs, each as large as the weights themselves."""
    generator = torch.Generator().manual_seed(0)
    sizes = {network: layer_of(demo_checkpoint, network)[1].weight.shape for network in LAYERS}

    def lora() -> Matrices:
        return {
            network: (
                torch.randn(RANK, inner, generator=generator) / inner**0.5,
                torch.randn(outer, RANK, generator=generator),
            )
            for network, (outer, inner) in sizes.items()
        }

    return lora(), lora()


@pytest.fixture(scope="module")
def files(matrices: tuple[Matrices, Matrices], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    paths = (folder / "ink.safetensors", folder / "wash.safetensors")
    for path, lora in zip(paths, matrices, strict=True):
        tensors = {
            f"{network}.{LAYERS[network]}.lora_{part}.weight": tensor
            for network, pair in lora.items()
            for part, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, path)
    return paths


def with_loras(checkpoint: Checkpoint, *loras: tuple[Path, float]) -> Checkpoint:
    return Checkpoint.open(replace(checkpoint.paths, loras=tuple(LoraSpec(*lora) for lora in loras)))


def test_files_scales_and_order_are_in_the_key(
    built: Callable[[Precision], Built], files: tuple[Path, Path], tmp_path: Path
) -> None:
    build = built("fp16")
    ink, wash = files
    chosen = [(), ((ink, 1.0),), ((ink, 0.5),), ((wash, 0.5),), ((ink, 0.5), (wash, -0.8)), ((wash, -0.8), (ink, 0.5))]
    identities = [
        identify(with_loras(build.checkpoint, *loras), "tensorrt", Numerics("fp16"), options=FOR_BOTH)
        for loras in chosen
    ]
    assert [[(lora.name, lora.scale) for lora in identity.loras] for identity in identities] == [
        [(path.name, scale) for path, scale in loras] for loras in chosen
    ]
    assert len({engine_key(identity, RANGES) for identity in identities}) == len(chosen)
    assert not any(one.serves(other) or other.serves(one) for one, other in combinations(identities, 2))
    renamed = Path(shutil.copy(ink, tmp_path / "renamed.safetensors"))
    same = identify(
        with_loras(build.checkpoint, (renamed, 0.5)),
        "tensorrt",
        Numerics("fp16"),
        options=FOR_BOTH,
    )
    assert engine_key(same, RANGES) == engine_key(identities[2], RANGES)


def test_an_engine_without_the_loras_is_told_by_name(
    built: Callable[[Precision], Built], files: tuple[Path, Path]
) -> None:
    build = built("fp16")
    checkpoint = with_loras(build.checkpoint, *zip(files, SCALES, strict=True))
    asked = replace(identify(checkpoint, "tensorrt", Numerics("fp16"), options=FOR_BOTH), architecture="sm89")
    told = (
        r" differs: LoRA is none in the store, ink.safetensors:0.5 \(blake3 [0-9a-f]{8}\), "
        r"wash.safetensors:-0.8 \(blake3 [0-9a-f]{8}\) asked for; build it: storyadapter-trt build --it$"
    )
    with pytest.raises(EngineMismatchError, match=told):
        build.store.find(asked, RANGES, "storyadapter-trt build --it")


class Enough(Exception):
    """What the test needs is exported."""


def test_several_loras_with_scales_are_fused_in_what_is_built(
    demo_checkpoint: Checkpoint, matrices: tuple[Matrices, Matrices], files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The ONNX files that a build hands to TensorRT compute what the formula gives, and nothing near it."""
    checkpoint = with_loras(demo_checkpoint, *zip(files, SCALES, strict=True))
    identity = identify(checkpoint, "tensorrt", Numerics("fp16"), options=BuildOptions(targets=("sm89",)))
    store, kept = EngineStore(tmp_path / "engines"), tmp_path / "onnx"

    def keep(network: str, what: str) -> None:
        if not what.startswith("building the engine"):
            return
        (folder,) = store.root.glob(".*.building")
        shutil.copytree(folder / "onnx", kept, dirs_exist_ok=True)
        if network == "text_projection":
            raise Enough

    with pytest.raises(Enough):
        build_engine(checkpoint, identity, RANGES, engine_dir=store.root, on_stage=keep)
    assert store.scan() == ([], [])

    for network in ("text_encoder", "text_projection"):
        right = deviation(kept, demo_checkpoint, network, matrices, SCALES)
        assert right < 5e-3
        for wrong in ((0.0, 0.0), (SCALES[0], 0.0), (0.0, SCALES[1]), SCALES[::-1], (1.0, 1.0), (0.45, -0.8)):
            assert deviation(kept, demo_checkpoint, network, matrices, wrong) > 4 * right


def deviation(
    folder: Path, plain: Checkpoint, network: str, matrices: tuple[Matrices, Matrices], scales: tuple[float, float]
) -> float:
    """‖file − module‖ / ‖module‖ of a network, the module's weights being W + Σ scale·up·down."""
    part = "text_encoder" if network == "text_encoder" else "unet"
    model, layer = layer_of(plain, part)
    with torch.no_grad():
        for lora, scale in zip(matrices, scales, strict=True):
            down, up = lora[part]
            layer.weight += scale * up @ down
    if part == "text_encoder":
        module = TextEncoder(model).eval()
    else:
        module = split_unet(model, plain.load_ip_adapter(torch.float32), grca)["text_projection"].eval()
    spec = network_specs(plain.geometry)[network]
    (example, *_) = run_examples(spec, module, LETTERS, "fp32")
    halves = {
        tensor.name: example.inputs[tensor.name].to(getattr(torch, tensor.dtype_name("fp16"))).numpy()
        for tensor in spec.inputs
    }
    outputs = open_session(folder / onnx_name(network)).run(list(example.outputs), halves)
    errors = [
        float((torch.from_numpy(got).float() - expected).norm() / expected.norm())
        for got, expected in zip(outputs, example.outputs.values(), strict=True)
    ]
    return max(errors)
