"""Parts that say of themselves what shapes can't tell."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import option
from storyadapter.method.errors import spelled
from tests.storyadapter.checkpoint.spoil import edit_config, refuses, tiny_paths


def told(checkpoint: Checkpoint) -> list[str]:
    return [spelled(notice, option) for notice in checkpoint.notices]


def given_vae(checkpoint: Checkpoint, folder: Path, **changes: object) -> Path:
    checkpoint.load("vae", torch.float32).save_pretrained(folder)
    edit_config(folder / "config.json", **changes)
    return folder


def test_the_shipped_and_the_tiny_model_agree(demo_checkpoint: Checkpoint, checkpoint: Checkpoint) -> None:
    assert demo_checkpoint.notices == checkpoint.notices == ()


def test_a_vae_of_other_latents_is_refused(tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    paths = tiny_paths(tiny_model_dir, vae=given_vae(checkpoint, tmp_path / "vae", scaling_factor=0.18215))
    refuses(
        "the VAE given with --vae: scaling_factor is 0.18215 (Stable Diffusion 1.x and 2.x) in "
        f"{tmp_path}/vae/config.json; expected 0.13025 as in {tiny_model_dir}/vae/config.json: a VAE of the latents",
        paths,
    )


def test_a_vae_that_says_no_factor(tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    save_file(checkpoint.load("vae", torch.float32).state_dict(), file)
    assert told(Checkpoint.open(tiny_paths(tiny_model_dir, vae=file))) == [
        f"{file} doesn't say its scaling factor: 0.13025 is assumed, as {tiny_model_dir}/vae/config.json has"
    ]
    config = given_vae(checkpoint, tmp_path / "vae") / "config.json"
    values = json.loads(config.read_text())
    del values["scaling_factor"]
    config.write_text(json.dumps(values))
    assert told(Checkpoint.open(tiny_paths(tiny_model_dir, vae=tmp_path / "vae"))) == [
        f"{config} says no scaling_factor: 0.18215 is assumed, as by diffusers"
    ]


def test_the_own_vae_of_another_factor_is_told(model_dir: Path) -> None:
    edit_config(model_dir / "vae" / "config.json", scaling_factor=0.2)
    assert told(Checkpoint.open(tiny_paths(model_dir))) == [
        f"{model_dir}/vae/config.json: scaling_factor is 0.2, SDXL's is 0.13025; drawn as it says"
    ]


@pytest.mark.parametrize("factor", [0, -1, None, "0.13", True, [0.13], float("inf"), float("nan")])
def test_a_factor_that_is_none(model_dir: Path, factor: object) -> None:
    edit_config(model_dir / "vae" / "config.json", scaling_factor=factor)
    refuses(f"vae/config.json: scaling_factor is {factor!r}; expected a number above 0", tiny_paths(model_dir))


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_a_tokenizer_that_ends_texts_otherwise(model_dir: Path, encoder: str) -> None:
    edit_config(model_dir / encoder / "config.json", eos_token_id=5)
    refuses(f"ends a text with token … {encoder}/config.json says eos_token_id 5; expected", tiny_paths(model_dir))


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({}, None),
        ({"image_mean": [0.48145466, 0.4578275, 0.40821073], "size": {"shortest_edge": 224}, "crop_size": 224}, None),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_std": "no list"}, "image_std"),
        ({"crop_size": {"height": 336, "width": 336}}, "crop_size"),
    ],
)
def test_another_preprocessing_is_told(model_dir: Path, changes: dict, told_of: str | None) -> None:
    path = model_dir / "image_encoder" / "preprocessor_config.json"
    path.write_text(json.dumps(changes))
    expected = [f"{path}: {told_of} isn't CLIP's own, which the method uses in any case"] if told_of else []
    assert told(Checkpoint.open(tiny_paths(model_dir))) == expected


@pytest.mark.parametrize("option_name", ["center_input_sample", "only_cross_attention", "dual_cross_attention"])
def test_a_unet_that_computes_something_else(model_dir: Path, option_name: str) -> None:
    edit_config(model_dir / "unet" / "config.json", **{option_name: True})
    refuses(f"unet/config.json: {option_name} is True; expected a UNet of SDXL, where it is off", tiny_paths(model_dir))
