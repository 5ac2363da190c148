"""The same story by diffusers' own SDXL pipeline for ControlNets with an IP-Adapter, all N pictures in one list."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.oracle.diffusers_ip_adapter import PUBLISHED_SCHEDULER
from tests.oracle.published_method import NEGATIVE_PROMPT


@torch.no_grad()
def controlnet_story(
    folder: Path,
    controlnets: Sequence[ControlNetModel],
    prompts: Sequence[str],
    controls: Sequence[Sequence[Image.Image]],
    *,
    scales: Sequence[float],
    steps: int,
    seed: int,
    guidance: float = 5.0,
    conditioning: Sequence[float] = (1.0,),
    shares: Sequence[tuple[float, float]] = ((0.0, 1.0),),
) -> list[list[Image.Image]]:
    """Every frame of every iteration with its control pictures.

    Args:
        folder: an SDXL folder with `image_encoder/` and `ip-adapter.safetensors` in it.
        controls: of each frame, one for each ControlNet.
        conditioning, shares: scale and share of the steps of each ControlNet.
    """
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
        folder,
        controlnet=list(controlnets),
        torch_dtype=torch.float32,
        scheduler=PUBLISHED_SCHEDULER,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32),
        feature_extractor=CLIPImageProcessorPil(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, pictures: Sequence[Image.Image], **references: object) -> Image.Image:
        return pipeline(
            prompt=prompt,
            image=list(pictures),
            negative_prompt=NEGATIVE_PROMPT,
            num_inference_steps=steps,
            guidance_scale=guidance,
            controlnet_conditioning_scale=list(conditioning),
            control_guidance_start=[start for start, _ in shares],
            control_guidance_end=[end for _, end in shares],
            generator=torch.Generator("cpu").manual_seed(seed),
            **references,
        ).images[0]

    iterations = [[draw(prompt, pictures) for prompt, pictures in zip(prompts, controls, strict=True)]]
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter.safetensors")
    for scale in scales:
        pipeline.set_ip_adapter_scale(scale)
        references = [frame.resize((256, 256)) for frame in iterations[-1]]
        drawn = [
            draw(prompt, pictures, ip_adapter_image=[references])
            for prompt, pictures in zip(prompts, controls, strict=True)
        ]
        iterations.append(drawn)
    return iterations
