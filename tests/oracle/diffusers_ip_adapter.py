"""The same story by diffusers' own SDXL pipeline and IP-Adapter, with all N pictures in one adapter's list.

Its attention flattens the pictures' tokens into one set of keys, which is the global reference cross-attention; its
unconditional tokens are the projection of zero embeddings, as published.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.oracle.published_method import NEGATIVE_PROMPT, STYLES

PUBLISHED_SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


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
    scheduler: SchedulerMixin | None = PUBLISHED_SCHEDULER,
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    prepare: Callable[[StableDiffusionXLPipeline], object] = lambda pipeline: None,
) -> list[list[Image.Image]]:
    """As `published_method.published_story`, computed by diffusers alone.

    Args:
        scheduler: None for that of the folder.
        timesteps: instead of those that the scheduler chooses.
        eta: of schedulers that have one.
        prepare: changes the pipeline before anything is drawn.
    """
    own = {} if scheduler is None else {"scheduler": scheduler}
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        **own,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=torch.float32),
        feature_extractor=CLIPImageProcessorPil(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)

    def draw(prompt: str, **references: object) -> Image.Image:
        return pipeline(
            prompt=STYLES[style].format(prompt),
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            **({"num_inference_steps": steps} if timesteps is None else {"timesteps": list(timesteps)}),
            eta=eta,
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


@torch.no_grad()
def image_to_image_story(
    folder: Path,
    image_encoder: Path,
    ip_adapter: Path,
    prompts: Sequence[str],
    *,
    scheduler: SchedulerMixin,
    scales: Sequence[float],
    steps: int,
    strength: float,
    seed: int,
    height: int,
    width: int,
    guidance: float = 5.0,
    negative_prompt: str = NEGATIVE_PROMPT,
) -> list[list[Image.Image]]:
    """Iterations after the first by diffusers' image-to-image pipeline, from the latents of the iteration before."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        scheduler=scheduler,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=torch.float32),
        feature_extractor=CLIPImageProcessorPil(),
        add_watermarker=False,
    )
    again = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    for each in (pipeline, again):
        each.set_progress_bar_config(disable=True)

    def draw(draw_with: DiffusionPipeline, prompt: str, **more: object) -> torch.Tensor:
        return draw_with(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            **more,
        ).images

    def decoded(latents: torch.Tensor) -> Image.Image:
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(image)[0]

    latents = [draw(pipeline, prompt, height=height, width=width) for prompt in prompts]
    iterations = [[decoded(frame) for frame in latents]]
    again.load_ip_adapter(str(ip_adapter.parent), subfolder="", weight_name=ip_adapter.name)
    for scale in scales:
        again.set_ip_adapter_scale(scale)
        references = [frame.resize((256, 256)) for frame in iterations[-1]]
        latents = [
            draw(again, prompt, image=frame, strength=strength, ip_adapter_image=[references])
            for prompt, frame in zip(prompts, latents, strict=True)
        ]
        iterations.append([decoded(frame) for frame in latents])
    return iterations
