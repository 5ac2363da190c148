"""The files of a tiny VAE for references: what is read, what is computed, and one line for what is no such VAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import InputError
from tests.reference_vaes import tiny_reference_vae, write_reference_vae
from tests.refusals import raises_typed
from tests.storyadapter.checkpoint.spoil import cut_short, edit_config, edit_tensors, refuses, tiny_paths

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference_vae(tmp_path / "taesdxl")


@torch.no_grad()
@pytest.mark.parametrize("scaling_factor", [1.0, 0.5])
def test_it_decodes_as_diffusers_does(tiny_model_dir: Path, tmp_path: Path, scaling_factor: float) -> None:
    folder = write_reference_vae(tmp_path / "tiny", scaling_factor=scaling_factor)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, reference_vae=folder))
    latents = 2 * torch.randn(3, 4, 8, 12, generator=torch.manual_seed(1))
    found = open_networks(checkpoint, device="cpu")["reference_decoder"]({"latents": latents})["image"]
    vae = AutoencoderTiny.from_pretrained(folder)
    expected = vae.decode(latents / scaling_factor).sample
    assert found.shape == (3, 3, 64, 96) and expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (vae.decode(latents).sample - expected).abs().max() > 0.1 or scaling_factor == 1


def test_a_file_is_one_of_the_published_sizes(tiny_model_dir: Path, tmp_path: Path) -> None:
    vae = AutoencoderTiny()
    save_file(vae.state_dict(), tmp_path / "taesdxl.safetensors")
    torch.save(vae.state_dict(), tmp_path / "taesdxl.bin")
    for name in ("taesdxl.safetensors", "taesdxl.bin"):
        checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, reference_vae=tmp_path / name))
        loaded = checkpoint.load("reference_vae", torch.float32)
        torch.testing.assert_close(loaded.state_dict(), vae.state_dict(), rtol=0, atol=0)
        assert checkpoint.label.endswith(f" + reference VAE {name}")
        assert checkpoint.files_by_component["reference_vae"] == (tmp_path / name,)


def test_without_one_there_is_no_such_network(checkpoint: Checkpoint) -> None:
    assert not checkpoint.geometry.reference_vae and "reference_vae" not in checkpoint.files_by_component
    assert "reference_decoder" not in open_networks(checkpoint).by_name


def spoilt(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder / "config.json", **{name: value})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            spoilt("_class_name", "AutoencoderKL"),
            "config.json: configuration of AutoencoderKL; expected a tiny VAE for SDXL (AutoencoderTiny), such as",
        ),
        (spoilt("latent_channels", 16), "config.json: latent_channels is 16; expected 4, as for SDXL"),
        (spoilt("shift_factor", 0.1), "config.json: shift_factor is 0.1; expected 0, as for SDXL"),
        (spoilt("out_channels", 4), "config.json: out_channels is 4; expected 3"),
        (
            spoilt("num_decoder_blocks", [1, 1]),
            "pictures become 2 times as large as latents (num_",
        ),
        (spoilt("act_fn", "nonsense"), "config.json doesn't describe the VAE given with --reference-vae: "),
        (lambda folder: cut_short(folder / NAME), "is not a whole .safetensors file"),
        (lambda folder: (folder / NAME).unlink(), "taesdxl has no weights"),
        (lambda folder: (folder / "config.json").unlink(), "--reference-vae … taesdxl has no config.json"),
        (
            lambda folder: edit_tensors(folder / NAME, lambda tensors: tensors.pop("decoder.layers.0.bias")),
            "the VAE given with --reference-vae in … 1 tensor missing (decoder.layers.0.bias)",
        ),
    ],
)
def test_what_is_no_tiny_vae_for_sdxl_is_told(
    tiny_model_dir: Path, folder: Path, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(folder)
    refuses(told, tiny_paths(tiny_model_dir, reference_vae=folder))


def test_other_files_are_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    refuses("--reference-vae nowhere: there is no such", tiny_paths(tiny_model_dir, reference_vae="nowhere"))
    refuses(
        "vae/config.json: configuration of AutoencoderKL; expected a tiny VAE",
        tiny_paths(tiny_model_dir, reference_vae=tiny_model_dir / "vae"),
    )
    vae = AutoencoderKL.from_pretrained(tiny_model_dir / "vae").state_dict()
    for name, tensors in (("kl", vae), ("original", {"1.weight": torch.zeros(1)})):
        save_file(tensors, tmp_path / name)
        refuses(
            f"{name} is no AutoencoderTiny of diffusers: its tensors begin with … expected a tiny VAE",
            tiny_paths(tiny_model_dir, reference_vae=tmp_path / name),
        )
    save_file(tiny_reference_vae().state_dict(), tmp_path / "small")
    refuses("--reference-vae in … of another shape", tiny_paths(tiny_model_dir, reference_vae=tmp_path / "small"))


def test_the_demo_model_takes_none(folder: Path) -> None:
    with raises_typed(InputError, "^--reference-vae was given without --base-model; expected all of --base-model, "):
        CheckpointPaths.given(None, None, None, reference_vae=folder)
