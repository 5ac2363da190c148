"""The random demo model is readable by the published libraries, seeded, and its references matter."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from storyadapter.demo.training.networks import TINY, build, write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_model(path, seed=3, config=TINY)
    return path


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    write_random_model(tmp_path / "same", seed=3, config=TINY)
    write_random_model(tmp_path / "other", seed=4, config=TINY)
    for name in ("unet/diffusion_pytorch_model.safetensors", "ip-adapter.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_random_model(tmp_path, config=TINY)
    assert torch.equal(torch.rand(3), expected)


def test_diffusers_draws_a_finite_picture_and_the_prompt_matters(folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> torch.Tensor:
        pixels = pipeline(
            prompt, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0)
        ).images
        return pixels

    fox, bear = draw("a fox"), draw("bears at night")
    assert fox.shape == (1, 3, TINY.pixels, TINY.pixels)
    assert torch.isfinite(fox).all()
    assert fox.std() > 0.05
    assert (fox - bear).abs().mean() > 0.01


def test_diffusers_reads_the_adapter_and_references_matter(folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)

    def draw(embedding: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([torch.zeros_like(embedding), embedding])[:, None]
        return pipeline(
            "a fox",
            num_inference_steps=3,
            output_type="pt",
            ip_adapter_image_embeds=[rows],
            generator=torch.Generator().manual_seed(0),
        ).images

    a, b = torch.randn(2, TINY.embedding_width, generator=torch.Generator().manual_seed(1))
    assert (draw(a) - draw(b)).abs().mean() > 0.02


def test_adapter_keys_are_the_indices_of_the_cross_attentions() -> None:
    model = build(TINY)
    names = list(model.unet.attn_processors)
    expected = {str(i) for i, name in enumerate(names) if "attn2" in name}
    assert set(model.adapter.ip_adapter.keys()) == expected
    assert "ip_adapter.1.to_k_ip.weight" in model.adapter.state_dict()


def test_adapter_file_has_the_published_parts(folder: Path) -> None:
    state = load_file(folder / "ip-adapter.safetensors")
    assert {"image_proj.proj.weight", "image_proj.norm.bias"} <= set(state)
    assert state["image_proj.proj.weight"].shape == (4 * TINY.cross_width, TINY.embedding_width)


def test_any_text_tokenizes_and_the_second_tokenizer_pads_with_its_own_sign(folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, unet=None, vae=None)
    ids = pipeline.tokenizer("Ein Fuchs läuft, 狐!").input_ids
    assert pipeline.tokenizer.unk_token_id not in ids[1:-1]
    padded = pipeline.tokenizer_2("a", padding="max_length", max_length=6).input_ids
    assert padded[-1] == 0
    assert json.loads((folder / "tokenizer_2/vocab.json").read_text())["!"] == 0


def test_text_encoder_keys_are_the_published_ones_and_are_read_back(folder: Path) -> None:
    state = load_file(folder / "text_encoder/model.safetensors")
    assert all(key.startswith("text_model.") for key in state)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    read = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    for key, value in state.items():
        torch.testing.assert_close(read[key.removeprefix("text_model.")], value, rtol=0, atol=0)
