"""ControlNets' files: every layout is the same network, and other kinds are told by their names."""

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from storyadapter.checkpoint import Checkpoint
from storyadapter.checkpoint.controlnets import ControlNetSpec
from storyadapter.method.control import ControlSettings
from storyadapter.method.errors import CheckpointError, InputError
from tests.control_models import tiny_controlnet, write_controlnet
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.original_layout import original_controlnet
from tests.storyadapter.checkpoint.spoil import cut_short, edit_config, edit_tensors, refuses, tiny_paths

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_controlnet(tiny_model_dir, tmp_path / "openpose")


def loaded(model: Path, controlnet: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(tiny_paths(model, controlnets=(controlnet,)))
    return checkpoint.load("controlnet_0", torch.float32).state_dict()


def test_every_layout_is_the_same_network(tiny_model_dir: Path, folder: Path, tmp_path: Path) -> None:
    expected = tiny_controlnet(tiny_model_dir, 0).state_dict()
    original = {name: t.contiguous() for name, t in original_controlnet(tiny_controlnet(tiny_model_dir, 0)).items()}
    save_file(original, tmp_path / "original.safetensors")
    save_file({f"control_model.{name}": t for name, t in original.items()}, tmp_path / "prefixed.safetensors")
    torch.save(load_file(folder / NAME), tmp_path / "pickled.bin")
    files = [tmp_path / name for name in ("original.safetensors", "prefixed.safetensors", "pickled.bin")]
    for controlnet in (folder, folder / NAME, *files):
        torch.testing.assert_close(loaded(tiny_model_dir, controlnet), expected, rtol=0, atol=0)


def test_its_files_are_part_of_the_model(tiny_model_dir: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, controlnets=(folder, folder / NAME)))
    files = checkpoint.files_by_component
    assert files["controlnet_0"] == (folder / "config.json", folder / NAME)
    assert files["controlnet_1"] == (folder / NAME,)
    assert checkpoint.geometry.controls[0] == checkpoint.geometry.controls[1]


def spoilt(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder / "config.json", **{name: value})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_tensors(folder / NAME, lambda tensors: tensors.update({new: tensors.pop(old)}))

    return change


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoilt("_class_name", "ControlNetUnionModel"), "config.json: a ControlNetUnion, which does several kinds"),
        (spoilt("num_control_type", 6), "config.json: a ControlNetUnion"),
        (renamed("conv_in.bias", "task_embedding"), "openpose is a ControlNetUnion"),
        (renamed("conv_in.bias", "lora_controlnet"), "openpose is a Control-LoRA; expected a ControlNet for SDXL"),
        (spoilt("_class_name", "SD3ControlNetModel"), "config.json: configuration of SD3ControlNetModel; expected"),
        (spoilt("_class_name", "AutoencoderKL"), "config.json: configuration of AutoencoderKL; expected a ControlNet"),
        (
            spoilt("cross_attention_dim", 768),
            "config.json: a ControlNet for Stable Diffusion 1.5, which takes text 768 wide; the UNet takes 64",
        ),
        (spoilt("addition_embed_type", None), "addition_embed_type is None; expected 'text_time'"),
        (spoilt("controlnet_conditioning_channel_order", "bgr"), "channel_order is 'bgr'; expected 'rgb'"),
        (spoilt("global_pool_conditions", True), "global_pool_conditions is True; expected False"),
        (spoilt("block_out_channels", [32, 64, 64]), "expected (32, 32, 64) as in the UNet, to whose blocks it adds"),
        (spoilt("layers_per_block", 2), "layers_per_block is 2; expected 1 as in the UNet"),
        (spoilt("projection_class_embeddings_input_dim", 70), "is 70; expected 80 as in the UNet"),
        (spoilt("conditioning_embedding_out_channels", [8, 8]), "pictures become 1/2 as large"),
        (lambda folder: cut_short(folder / NAME), "is not a whole .safetensors file"),
        (lambda folder: (folder / NAME).write_bytes(b"\0" * 100), "a download that broke off"),
        (lambda folder: (folder / NAME).unlink(), "openpose has no weights"),
        (lambda folder: (folder / "config.json").unlink(), "--controlnet … openpose has no config.json"),
        (renamed("conv_in.bias", "conv_in.bios"), "the ControlNet given with --controlnet in … 1 tensor missing"),
    ],
)
def test_what_is_no_controlnet_for_sdxl_is_told(
    tiny_model_dir: Path, folder: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(folder)
    refuses(told, tiny_paths(tiny_model_dir, controlnets=(folder,)))


def test_files_of_other_kinds_are_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    names = ("control_model.input_hint_block.0.weight", "control_model.input_blocks.1.1.attn2.to_k.weight")
    old = dict(zip(names, ((1,), (9, 768)), strict=True))
    for tensors, told in (
        ({"lllite_unet_x.weight": (1, 1)}, "is a ControlNet-LLLite"),
        ({"adapter.body.0.weight": (1, 1)}, "is a T2I-Adapter"),
        ({"down_blocks.0.bias": (1,)}, "is no ControlNet: its tensors begin with down_blocks.0.bias"),
        (old, "a ControlNet for Stable Diffusion 1.5, which takes text 768 wide"),
    ):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
        refuses(told, tiny_paths(tiny_model_dir, controlnets=(path,)))
    refuses("--controlnet gone: there is no such file or folder", tiny_paths(tiny_model_dir, controlnets=("gone",)))


def test_how_it_is_typed() -> None:
    assert ControlNetSpec.parse("a/b") == ControlNetSpec(Path("a/b"))
    assert ControlNetSpec.parse("C:x:0.5") == ControlNetSpec(Path("C:x"), ControlSettings(0.5))
    assert ControlNetSpec.parse("pose:1:0-.5") == ControlNetSpec(Path("pose"), ControlSettings(1.0, 0.0, 0.5))
    for text, told in (
        (":0.5", "--controlnet ':0.5' has no path"),
        ("pose:0,5", "'pose:0,5': 0,5 has a comma; expected 0.5, written with a point"),
        ("pose:11", "--controlnet: its scale is 11; expected 0 to 10"),
        ("pose:1:0.5-0.5", "--controlnet: its steps are 0.5-0.5; expected two shares of the steps"),
        ("pose:1:0-1.5", "--controlnet: its steps are 0-1.5"),
    ):
        with raises_typed(InputError, re.escape(told)):
            ControlNetSpec.parse(text)


@given(
    path=st.text(string.printable.strip() + ":0.", min_size=1).map(Path),
    scale=st.floats(0, 10),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: pair[0] < pair[1]),
)
def test_str_gives_what_parse_reads(path: Path, scale: float, share: tuple[float, float]) -> None:
    spec = ControlNetSpec(path, ControlSettings(scale, *share))
    assert ControlNetSpec.parse(str(spec)) == spec


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        ControlNetSpec.parse(text)
    except InputError as error:
        assert not isinstance(error, CheckpointError) and error.field == "controlnet"
