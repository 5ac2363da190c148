"""The demo model exported and built once per precision and test session, for two architectures at once.

In fp16 as it is; in bf16 with all that a model may have besides: a ControlNet, and a UNet that takes the guidance as an
embedding.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from filelock import FileLock

from storyadapter.checkpoint import Checkpoint
from storyadapter.demo.shipped import MODEL
from storyadapter.engine.opening import build_engine
from storyadapter.engine.store import EngineStore
from storyadapter.engine.tensorrt.library import Library, choose_library
from storyadapter.export.onnx_export import export_network
from storyadapter.model.grca import grca
from storyadapter.model.numerics import Precision
from storyadapter.model.unet import GlobalReferenceCrossAttention
from tests.control_models import write_controlnet
from tests.engine.engine_requests import identify
from tests.engine.tensorrt.building import LETTERS, OPTIONS, RANGES, TARGETS, Built, LayerBlock, layer_block_spec


@pytest.fixture(scope="session")
def rtx() -> Library:
    """The TensorRT-RTX that is installed."""
    library, _ = choose_library(TARGETS, None)
    return library


@pytest.fixture(scope="session")
def with_more(demo_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The demo model with a ControlNet and a UNet that takes the guidance as an embedding 16 wide."""
    folder, plain = tmp_path_factory.mktemp("with-more"), demo_checkpoint.load("unet", torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # each process makes the same
        unet = UNet2DConditionModel.from_config(plain.config, time_cond_proj_dim=16)
    unet.load_state_dict(plain.state_dict(), strict=False)
    unet.save_pretrained(folder / "unet")
    controlnet = write_controlnet(MODEL, folder / "controlnet")
    return Checkpoint.open(replace(demo_checkpoint.paths, unet=folder / "unet", controlnets=(controlnet,)))


@pytest.fixture(scope="session")
def built(demo_checkpoint: Checkpoint, with_more: Checkpoint, session_folder: Path) -> Callable[[Precision], Built]:
    """Build the model of a precision, or give what was built, in whichever process."""

    @cache
    def build(precision: Precision) -> Built:
        folder = session_folder / f"tensorrt-{precision}"
        store, told = EngineStore(folder / "engines"), folder / "told.json"
        checkpoint = with_more if precision == "bf16" else demo_checkpoint
        numerics = checkpoint.geometry.numerics(precision)
        identity = identify(checkpoint, "tensorrt", numerics, options=OPTIONS)
        stages: list[tuple[str, str]] = []
        fractions: list[tuple[str, float]] = []
        with FileLock(f"{folder}.lock"):
            engine = build_engine(
                checkpoint,
                identity,
                RANGES,
                options=OPTIONS,
                engine_dir=store.root,
                on_stage=lambda network, what: stages.append((network, what)),
                on_fraction=lambda network, fraction: fractions.append((network, fraction)),
            )
            if stages:
                told.write_text(json.dumps([stages, fractions]))
            stages, fractions = ([tuple(item) for item in items] for items in json.loads(told.read_text()))
        return Built(checkpoint, identity, store, engine, tuple(stages), tuple(fractions))

    return build


@pytest.fixture(scope="session")
def layer_block_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """SDXL's layer block of a width, full size, exported in fp16."""

    @cache
    def export(channels: int) -> Path:
        torch.manual_seed(channels)
        heads = channels // 64
        block = CrossAttnDownBlock2D(
            in_channels=channels,
            out_channels=channels,
            temb_channels=1280,
            num_layers=1,
            num_attention_heads=heads,
            cross_attention_dim=2048,
            add_downsample=False,
            use_linear_projection=True,
        )
        transformer = block.attentions[0].transformer_blocks[0]
        transformer.attn2 = attention = GlobalReferenceCrossAttention(transformer.attn2, 0, grca)
        module = LayerBlock(block, attention).half().eval()
        folder = tmp_path_factory.mktemp(f"block-{channels}")
        return export_network(layer_block_spec(channels), module, LETTERS, "fp16", folder)

    return export
