"""Story-Adapter written the straightforward, slow way: nothing cached, nothing shared, one frame at a time, fp32.

Every frame encodes all N references again (N² encodings per iteration), every step projects text and references
again, the unconditional row attends to 4N tokens, and attention scores are materialized.

Sources: Story-Adapter (arXiv 2410.06244), IP-Adapter (arXiv 2308.06721), SDXL (arXiv 2307.01952).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEXT_POSITIONS = 77
NEGATIVE_PROMPT = "monochrome, lowres, bad anatomy, worst quality, low quality"
STYLES = {
    "none": "{}",
    "realistic": "best quality, high quality, {}",
    "comic": (
        "best quality, high quality, comic {} . graphic illustration, comic art, graphic novel art, vibrant, "
        "highly detailed"
    ),
    "film": (
        "best quality, high quality, cinematic film still, {} . shallow depth of field, vignette, highly detailed, "
        "high budget, bokeh, cinemascope, moody, epic, gorgeous, film grain, grainy"
    ),
}

Mistake = Literal["no references", "half scale", "joint softmax", "shifted layers", "swapped text"]
MISTAKES: tuple[Mistake, ...] = ("no references", "half scale", "joint softmax", "shifted layers", "swapped text")


@dataclass(frozen=True)
class PublishedModel:
    """All networks of one story, in fp32 on the CPU, as loaded from the published formats."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    image_encoder: CLIPVisionModelWithProjection
    image_projection: dict[str, Tensor]
    adapter_layers: dict[str, tuple[Tensor, Tensor]]  # name of the attention processor -> to_k_ip, to_v_ip


def load_published_model(folder: Path, image_encoder: Path, ip_adapter: Path) -> PublishedModel:
    """Reads a diffusers SDXL folder, a CLIP image-encoder folder and an IP-Adapter `.safetensors` or `.bin`."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    if ip_adapter.suffix == ".safetensors":
        adapter: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in load_file(ip_adapter).items():
            part, name = key.split(".", 1)
            adapter[part][name] = value.float()
    else:
        parts = torch.load(ip_adapter, map_location="cpu", weights_only=True)
        adapter = {part: {name: value.float() for name, value in parts[part].items()} for part in parts}
    layers = {
        name: (adapter["ip_adapter"][f"{index}.to_k_ip.weight"], adapter["ip_adapter"][f"{index}.to_v_ip.weight"])
        for index, name in enumerate(unet.attn_processors)  # self-attention counted
        if name.endswith("attn2.processor")
    }
    return PublishedModel(
        tokenizers=(
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"),
        ),
        text_encoders=(
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
            CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2", dtype=torch.float32),
        ),
        unet=unet,
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=torch.float32),
        image_projection=adapter["image_proj"],
        adapter_layers=layers,
    )


@torch.no_grad()
def published_story(
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
    mistake: Mistake | None = None,
) -> list[list[Image.Image]]:
    """Every frame of every iteration: first from text alone, then once per scale from all frames before.

    Args:
        folder: diffusers SDXL folder.
        image_encoder: CLIP image-encoder folder.
        ip_adapter: `.safetensors` or `.bin`.
        prompts: N of them.
        scales: λ of each iteration after the first.
        steps: of DDIM.
        seed: of every frame.
        height: in pixels.
        width: in pixels.
        guidance: of classifier-free guidance; only the prompt's row is computed when it is 1 or less.
        style: a key of `STYLES`.
        negative_prompt: of every frame.
        mistake: one deliberate error, for checking that a comparison would see it.

    Returns:
        [1 + len(scales)][N] pictures.
    """
    model = load_published_model(folder, image_encoder, ip_adapter)
    drawing = dict(
        steps=steps, seed=seed, height=height, width=width, guidance=guidance, negative_prompt=negative_prompt
    )
    styled = [STYLES[style].format(prompt) for prompt in prompts]
    iterations = [[published_frame(model, prompt, [], 0.0, **drawing) for prompt in styled]]
    for scale in scales:
        before = iterations[-1]
        iterations.append(
            [published_frame(model, prompt, before, scale, **drawing, mistake=mistake) for prompt in styled]
        )
    return iterations


@torch.no_grad()
def published_frame(
    model: PublishedModel,
    prompt: str,
    references: Sequence[Image.Image],
    scale: float,
    *,
    steps: int,
    seed: int,
    height: int,
    width: int,
    guidance: float,
    negative_prompt: str,
    mistake: Mistake | None = None,
) -> Image.Image:
    """One frame from its (already styled) prompt and the pictures of the iteration before, none for text alone."""
    text, pooled = encode_text(model, prompt)
    negative_text, negative_pooled = encode_text(model, negative_prompt)
    if mistake == "swapped text":
        text, negative_text = negative_text, text
    if references:
        embeddings = torch.cat([encode_picture(model, picture) for picture in references])
        tokens = project_embeddings(model, embeddings).flatten(0, 1)[None]
        no_tokens = project_embeddings(model, torch.zeros_like(embeddings)).flatten(0, 1)[None]
        text = torch.cat([text, tokens], dim=1)
        negative_text = torch.cat([negative_text, no_tokens], dim=1)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    if guidance > 1:
        text, pooled = torch.cat([negative_text, text]), torch.cat([negative_pooled, pooled])
        sizes = sizes.repeat(2, 1)

    install_attention(model, scale, mistake)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator("cpu").manual_seed(seed))
    for timestep in scheduler.timesteps:
        noise = model.unet(
            torch.cat([latents] * len(text)),
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        if guidance > 1:
            without, with_prompt = noise.chunk(2)
            noise = without + guidance * (with_prompt - without)
        latents = scheduler.step(noise, timestep, latents, eta=0.0).prev_sample

    decoded = model.vae.decode(latents / model.vae.config.scaling_factor).sample[0]
    pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def encode_text(model: PublishedModel, text: str) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states of both encoders side by side, [1, 77, 2048], and the second's pooled text."""
    states = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(
            text, padding="max_length", max_length=TEXT_POSITIONS, truncation=True, return_tensors="pt"
        ).input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, dim=-1), output.text_embeds


def encode_picture(model: PublishedModel, picture: Image.Image) -> Tensor:
    """A picture squeezed to 256×256, then preprocessed and encoded by CLIP: [1, D]."""
    pixels = CLIPImageProcessorPil()(picture.resize((256, 256)), return_tensors="pt").pixel_values
    return model.image_encoder(pixels).image_embeds


def project_embeddings(model: PublishedModel, embeddings: Tensor) -> Tensor:
    """The adapter's four tokens of each embedding: [N, 4, cross-attention width]."""
    parts = model.image_projection
    width = len(parts["norm.weight"])
    tokens = (embeddings @ parts["proj.weight"].T + parts["proj.bias"]).reshape(len(embeddings), 4, width)
    return torch.nn.functional.layer_norm(tokens, (width,), parts["norm.weight"], parts["norm.bias"])


def install_attention(model: PublishedModel, scale: float, mistake: Mistake | None) -> None:
    """Gives every attention layer of the UNet a processor that computes it the long way."""
    layers = dict(model.adapter_layers)
    if mistake == "shifted layers":
        for width in {len(key) for key, _ in layers.values()}:
            names = [name for name, (key, _) in layers.items() if len(key) == width]
            layers |= {name: model.adapter_layers[names[index - 1]] for index, name in enumerate(names)}
    scale *= {"no references": 0.0, "half scale": 0.5}.get(mistake or "", 1.0)
    joint = mistake == "joint softmax"
    model.unet.set_attn_processor(
        {
            name: CrossAttention(*layers[name], scale, joint) if name in layers else SelfAttention()
            for name in model.unet.attn_processors
        }
    )


class SelfAttention:
    """softmax(q·kᵀ/√D)·v over the layer's own positions."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None
        query, key, value = (
            split_heads(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](join_heads(attend(query, key, value)))


@dataclass(frozen=True)
class CrossAttention:
    """softmax(q·k_textᵀ/√D)·v_text + λ·softmax(q·k_refᵀ/√D)·v_ref; the first 77 positions are the text."""

    to_k_ip: Tensor
    to_v_ip: Tensor
    scale: float
    joint_softmax: bool

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        assert encoder_hidden_states is not None and attention_mask is None
        text, tokens = encoder_hidden_states[:, :TEXT_POSITIONS], encoder_hidden_states[:, TEXT_POSITIONS:]
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = split_heads(attn.to_k(text), attn.heads), split_heads(attn.to_v(text), attn.heads)
        if tokens.shape[1] == 0:
            return attn.to_out[0](join_heads(attend(query, key, value)))
        key_ip = split_heads(tokens @ self.to_k_ip.T, attn.heads)
        value_ip = split_heads(tokens @ self.to_v_ip.T, attn.heads)
        if self.joint_softmax:
            both = attend(query, torch.cat([key, key_ip], 2), torch.cat([value, self.scale * value_ip], 2))
        else:
            both = attend(query, key, value) + self.scale * attend(query, key_ip, value_ip)
        return attn.to_out[0](join_heads(both))


def split_heads(features: Tensor, heads: int) -> Tensor:
    """[B, S, H·D] to [B, H, S, D]."""
    return features.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(features: Tensor) -> Tensor:
    """[B, H, S, D] to [B, S, H·D]."""
    return features.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with its scores in memory. [B, H, S, D]"""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1) @ value
