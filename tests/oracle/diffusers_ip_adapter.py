"""The same story by diffusers' own SDXL pipeline and IP-Adapter, with all N pictures in one adapter's list.

Its attention flattens the pictures' tokens into one set of keys, which is the global reference cross-attention; its
unconditional tokens are the projection of zero embeddings, as published.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.oracle.published_method import NEGATIVE_PROMPT, STYLES


@torch.no_grad()
def diffusers_story(
    folder: Path,
    image_encoder: Path,
    ip_adapter: Path,
    prompts: Sequence[str],
    *,
    scales: Sequence[float],
    steps: int,
    seed: int,
    height: int,
    width: int,
    guidance: float = 5.0,
    style: str = "none",
    negative_prompt: str = NEGATIVE_PROMPT,
) -> list[list[Image.Image]]:
    """As `published_method.published_story`, computed by diffusers alone."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=torch.float32),
        feature_extractor=CLIPImageProcessorPil(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, **references: object) -> Image.Image:
        return pipeline(
            prompt=STYLES[style].format(prompt),
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            **references,
        ).images[0]

    # Before the adapter is loaded: afterwards the pipeline insists on pictures.
    iterations = [[draw(prompt) for prompt in prompts]]
    pipeline.load_ip_adapter(str(ip_adapter.parent), subfolder="", weight_name=ip_adapter.name)
    for scale in scales:
        pipeline.set_ip_adapter_scale(scale)
        references = [frame.resize((256, 256)) for frame in iterations[-1]]
        iterations.append([draw(prompt, ip_adapter_image=[references]) for prompt in prompts])
    return iterations
