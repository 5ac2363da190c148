"""The shipped demo model: it loads in the published libraries, is small, and draws what its prompts say."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPVisionModelWithProjection

from storyadapter import Story
from storyadapter.demo.held_out import split_visible
from storyadapter.demo.judge import load_judge
from storyadapter.demo.shipped import MODEL, STORY
from storyadapter.demo.training.dataset import label_table, mixed_scenes
from storyadapter.demo.training.scenes import draw
from storyadapter.demo.vocabulary import TRAITS, VISIBLE_TRAITS
from storyadapter.method.constants import STYLES

COLUMNS = list(TRAITS)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_all_files_together_are_at_most_12_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 12_000_000


def test_diffusers_reads_the_adapter_too(pipeline: StableDiffusionXLPipeline) -> None:
    encoder = CLIPVisionModelWithProjection.from_pretrained(MODEL / "image_encoder")
    assert encoder.config.projection_dim == pipeline.text_encoder_2.config.projection_dim
    pipeline.load_ip_adapter(str(MODEL), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None)
    pipeline.unload_ip_adapter()


def test_plain_diffusers_draws_species_action_and_place(pipeline: StableDiffusionXLPipeline) -> None:
    asked = [("rabbit", "reading", "in a cosy room"), ("fox", "balloon", "in the desert"), ("bear", "flag", "at night")]
    doing = {"reading": "reading a book", "balloon": "holding a balloon", "flag": "waving a flag"}
    prompts = [f"a blue {species} wearing a red sweater is {doing[action]} {place}" for species, action, place in asked]
    images = pipeline(
        prompts, num_inference_steps=16, guidance_scale=5, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    read = load_judge().read(torch.from_numpy(images * 255).permute(0, 3, 1, 2).float())
    places = {"in a cosy room": "room", "in the desert": "desert", "at night": "night"}
    for row, (species, action, place) in zip(read, asked, strict=True):
        found = {name: VISIBLE_TRAITS[name][row[COLUMNS.index(name)]] for name in ("species", "action", "place")}
        assert found == {"species": species, "action": action, "place": places[place]}


def test_the_judge_reads_every_trait_of_new_drawings() -> None:
    scenes = mixed_scenes(200, seed=987654, kinds=split_visible()[1])
    pictures = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes])).permute(0, 3, 1, 2)
    right = (load_judge().read(pictures).numpy() == label_table(scenes)).mean(0)
    assert dict(zip(COLUMNS, right >= 0.97, strict=True)) == dict.fromkeys(COLUMNS, True)


def test_the_demo_story_is_in_the_models_words() -> None:
    story = Story.from_file(STORY)
    assert len(story.prompts) >= 6 and story.style in STYLES
    tokenizer = StableDiffusionXLPipeline.from_pretrained(MODEL, unet=None, vae=None).tokenizer
    for prompt in story.final_prompts():
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids[1:-1])
        assert all(token.endswith("</w>") for token in tokens), prompt
