"""The published method on many small stories at once: a plain second implementation, for judging a freshly trained
demo model in seconds. What users run is `storyadapter.StoryPipeline`; `quality` measures that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from storyadapter.demo.training.attention import attach
from storyadapter.demo.training.networks import Adapter
from storyadapter.demo.training.pictures import resizer
from storyadapter.method.constants import DDIM_CONFIG, GUIDANCE, NEGATIVE_PROMPT, STEPS, TEXT_TOKENS


def input_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Tokens of texts, int64 [texts, 77], padded and cut."""
    return tokenizer(
        list(texts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@dataclass(frozen=True)
class Conditions:
    """Text of all frames, unconditional rows first: hidden states [2n, 77, E], pooled [2n, D]."""

    hidden: Tensor
    pooled: Tensor
    noise: Tensor  # [n, 4, h, w]

    def of(self, frames: slice) -> Conditions:
        """Those of some frames."""
        hidden, pooled = (x.unflatten(0, (2, -1))[:, frames].flatten(0, 1) for x in (self.hidden, self.pooled))
        return Conditions(hidden, pooled, self.noise[frames])


class BatchedMethod:
    """All frames of all stories are one batch; stories have the same number of frames."""

    def __init__(
        self,
        folder: Path,
        device: str,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load a demo model; `dtype` is the UNet's, all else is fp32."""
        self.device, self.steps, self.guidance = torch.device(device), steps, guidance
        self.at_once = 512 if self.device.type == "cuda" else 32
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
        self.vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)
        self.encoders = (
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).to(device),
        )
        self.tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / n) for n in ("tokenizer", "tokenizer_2"))
        self.adapter = Adapter(self.unet, self.vision.config.projection_dim)
        self.adapter.load_state_dict({k: v.float() for k, v in load_file(folder / "ip-adapter.safetensors").items()})
        attach(self.unet, self.adapter)
        for network in (self.unet, self.vision, self.adapter):
            network.to(self.device).eval()
        nn.Module.to(self.unet, dtype)
        self.adapter.to(dtype)

    @torch.inference_mode()
    def conditions(self, prompts: list[str], seeds: list[int]) -> Conditions:
        """Encode one prompt and draw one noise per frame; frames of one story have the same seed."""
        texts = [NEGATIVE_PROMPT] * len(prompts) + prompts
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = input_ids(tokenizer, texts).to(self.device)
            result = encoder(ids, output_hidden_states=True)
            hidden.append(result.hidden_states[-2])
            pooled = getattr(result, "text_embeds", pooled)
        size = self.unet.config.sample_size
        noise = [torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return Conditions(torch.cat(hidden, -1), pooled, torch.stack(noise).to(self.device))

    @torch.inference_mode()
    def embed(self, pictures: Tensor) -> Tensor:
        """Image embeddings [n, D] of pictures uint8 [n, 3, 128, 128]."""
        resize = resizer(self.device)
        parts = [self.vision(pixel_values=resize(part.to(self.device).float())) for part in pictures.split(256)]
        return torch.cat([part.image_embeds for part in parts])

    def draw(self, conditions: Conditions, references: Tensor | None, scale: float) -> Tensor:
        """Draw every frame.

        Args:
            conditions: of n frames.
            references: image embeddings [n, refs, D] that each frame attends to, or None for text alone.
            scale: λ.

        Returns:
            Pictures uint8 [n, 3, H, W].
        """
        frames = len(conditions.noise)
        parts = []
        for start in range(0, frames, self.at_once):
            rows = slice(start, start + self.at_once)
            seen = None if references is None else references[rows]
            parts.append(self._draw(conditions.of(rows), seen, scale))
        return torch.cat(parts)

    def draw_stories(
        self, prompts: Sequence[Sequence[Sequence[str]]], seeds: Sequence[Sequence[int]], scales: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Stories in all iterations.

        Args:
            prompts: of every frame of every drawing of every story, of one length each.
            seeds: of every drawing of every story.
            scales: of the iterations after the first.

        Returns:
            Pictures uint8 [iterations, stories, drawings, frames, 3, H, W], and the last iteration drawn with the
            references of the next story [stories, drawings, …].
        """
        shape = (len(prompts), len(prompts[0]), len(prompts[0][0]))
        texts = [text for story in prompts for drawing in story for text in drawing]
        conditions = self.conditions(texts, [seed for story in seeds for seed in story for _ in range(shape[2])])

        def references(pictures: Tensor, shift: int) -> Tensor:
            """Embeddings that each frame sees: of all frames of its story, or of the story `shift` further on."""
            stories = self.embed(pictures).unflatten(0, shape).roll(-shift, 0)
            return stories[:, :, None].expand(-1, -1, shape[2], -1, -1).flatten(0, 2)

        drawn = [self.draw(conditions, None, 0.0)]
        for scale in scales:
            drawn.append(self.draw(conditions, references(drawn[-1], 0), scale))
        control = self.draw(conditions, references(drawn[-2], 1), scales[-1])
        return torch.stack([part.unflatten(0, shape) for part in drawn]), control.unflatten(0, shape)

    @torch.inference_mode()
    def _draw(self, conditions: Conditions, references: Tensor | None, scale: float) -> Tensor:
        frames = len(conditions.noise)
        width = self.adapter.embedding_width
        embeddings = torch.zeros(2 * frames, 1 if references is None else references.shape[1], width)
        embeddings = embeddings.to(self.device)
        if references is not None:
            embeddings[frames:] = references
        dtype = self.unet.dtype
        tokens = self.adapter.tokens(embeddings.to(dtype)).flatten(1, 2)
        extra = {
            "references": tokens,
            "reference_mask": torch.ones(1, 1, 1, tokens.shape[1], dtype=torch.bool, device=self.device),
            "reference_scale": torch.tensor(0.0 if references is None else scale, device=self.device),
        }
        side = conditions.noise.shape[-1] * 8
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device).repeat(2 * frames, 1)
        scheduler = DDIMScheduler(**DDIM_CONFIG)
        scheduler.set_timesteps(self.steps)
        latents = conditions.noise
        for step in scheduler.timesteps:
            plain, told = (
                self.unet(
                    torch.cat([latents, latents]).to(dtype),
                    step,
                    encoder_hidden_states=conditions.hidden.to(dtype),
                    added_cond_kwargs={"text_embeds": conditions.pooled.to(dtype), "time_ids": sizes},
                    cross_attention_kwargs=extra,
                )
                .sample.float()
                .chunk(2)
            )
            latents = scheduler.step(plain + self.guidance * (told - plain), step, latents).prev_sample
        parts = [self.vae.decode(part / self.vae.config.scaling_factor).sample for part in latents.split(256)]
        return (torch.cat(parts) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
