"""Prompts beyond 75 tokens, in chunks: against diffusers given the same concatenated embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from storyadapter import Checkpoint, InputError, RunPlan, Story, StoryPipeline
from storyadapter.engine.opening import open_networks
from storyadapter.engine.store import StoredEngine
from storyadapter.method.events import FrameFinished, PromptTruncated
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.runtime.conditioning import Tokenizers
from tests.oracle.comparison import errors_of_frames
from tests.oracle.diffusers_ip_adapter import PUBLISHED_SCHEDULER
from tests.storyadapter.runtime.replaced import counting
from tests.storyadapter.runtime.test_pipeline import open_tiny

TIGHT = 0.05
LONG = " ".join(f"a red fox number {n} runs in the snow" for n in range(6))
PROMPTS = (f"{LONG}, then it sleeps under the sea", "a small owl")
PLAN = RunPlan(height=64, width=64, seed=3, steps=3, scales=(0.4,), negative_prompt="blurry")


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path) -> StoryPipeline:
    return open_tiny(tiny_model_dir)


def draw(pipeline: StoryPipeline, plan: RunPlan = PLAN, prompts: Sequence[str] = PROMPTS) -> list[list[Image.Image]]:
    drawn: dict[int, list[Image.Image]] = {}
    for event in pipeline.run(Story(tuple(prompts)), plan):
        if isinstance(event, FrameFinished):
            drawn.setdefault(event.iteration, []).append(event.picture)
    return list(drawn.values())


def by_diffusers(folder: Path, prompts: Sequence[str], plan: RunPlan) -> list[list[Image.Image]]:
    """The same with diffusers' pipeline, which takes the embeddings of chunks one after the other as it takes any."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder,
        torch_dtype=torch.float32,
        scheduler=PUBLISHED_SCHEDULER,
        image_encoder=encoder,
        feature_extractor=CLIPImageProcessorPil(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    encoders = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))

    def chunks_of(tokenizer, text: str) -> list[list[int]]:
        ids = tokenizer(text).input_ids[1:-1]
        return [ids[start : start + 75] for start in range(0, len(ids), 75)] or [[]]

    def encode(text: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        states, pooled = [], None
        for tokenizer, model in encoders:
            parts = chunks_of(tokenizer, text)
            parts += [[]] * (count - len(parts))
            of_chunks = []
            for number, part in enumerate(parts):
                ids = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
                ids += [tokenizer.pad_token_id] * (77 - len(ids))
                out = model(torch.tensor([ids]), output_hidden_states=True)
                of_chunks.append(out.hidden_states[-2])
                if number == 0:
                    pooled = out[0]
            states.append(torch.cat(of_chunks, dim=1))
        return torch.cat(states, dim=-1), pooled

    @torch.no_grad()
    def frame(prompt: str, **references) -> Image.Image:
        count = max(len(chunks_of(t, text)) for t, _ in encoders for text in (prompt, plan.negative_prompt))
        (positive, pooled), (negative, negative_pooled) = (
            encode(text, count) for text in (prompt, plan.negative_prompt)
        )
        return pipe(
            prompt_embeds=positive,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
            height=64,
            width=64,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            generator=torch.Generator("cpu").manual_seed(plan.seed),
            **references,
        ).images[0]

    iterations = [[frame(prompt) for prompt in prompts]]
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="ip-adapter.safetensors")
    for scale in plan.scales:
        pipe.set_ip_adapter_scale(scale)
        references = [picture.resize((256, 256)) for picture in iterations[-1]]
        iterations.append([frame(prompt, ip_adapter_image=[references]) for prompt in prompts])
    return iterations


def test_pictures_are_diffusers(pipeline: StoryPipeline, tiny_model_dir: Path) -> None:
    ours = draw(pipeline)
    for mine, expected in zip(ours, by_diffusers(tiny_model_dir, PROMPTS, PLAN), strict=True):
        assert max(errors_of_frames(mine, expected)) < TIGHT
    cut = draw(pipeline, replace(PLAN, prompt_chunks="1"))
    assert errors_of_frames(cut[0][:1], ours[0][:1])[0] > 10 * TIGHT
    assert errors_of_frames(cut[0][1:], ours[0][1:])[0] < TIGHT  # a short prompt is read as ever


def test_a_frames_chunks_are_its_own(pipeline: StoryPipeline) -> None:
    """Neither a neighbour's long prompt nor its negative prompt changes a frame; long ones share no call with short."""
    networks, counts = counting(pipeline.networks, "denoiser")
    counted = StoryPipeline(networks, (pipeline.tokenizers.first, pipeline.tokenizers.second))
    together = draw(counted, replace(PLAN, scales=()))
    assert counts["denoiser"] == 2 * 3
    for number, prompt in enumerate(PROMPTS):
        (alone,) = draw(pipeline, replace(PLAN, scales=()), [prompt])
        assert max(errors_of_frames([together[0][number]], alone)) < TIGHT
    keys = [
        [
            event.key
            for event in pipeline.run(Story(PROMPTS), replace(PLAN, scales=(), prompt_chunks=chunks))
            if isinstance(event, FrameFinished)
        ]
        for chunks in ("auto", "1")
    ]
    assert keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1]


def test_what_is_cut_off_is_told_where_it_is(pipeline: StoryPipeline) -> None:
    def told(chunks: str) -> list[PromptTruncated]:
        events = pipeline.run(Story(PROMPTS), replace(PLAN, prompt_chunks=chunks))
        return [event for event in [next(events), next(events)] if isinstance(event, PromptTruncated)]

    assert [event.words[-9:] for event in told("1")] == ["r the sea"]
    assert told("auto") == []


@given(st.lists(st.text(max_size=300), min_size=1, max_size=3), st.integers(1, 4))
def test_chunks_hold_all_words_in_order(checkpoint: Checkpoint, texts: list[str], chunks: int) -> None:
    pair = checkpoint.load_tokenizers()
    for tokenizer, ids in zip(pair, Tokenizers(*pair).input_ids(texts, chunks), strict=True):
        assert ids.shape == (len(texts) * chunks, 77)
        for text, rows in zip(texts, ids.view(len(texts), chunks, 77).tolist(), strict=True):
            start, *words, end = tokenizer.ids(text)
            inner = [row[1 : 1 + min(75, max(0, len(words) - 75 * n))] for n, row in enumerate(rows)]
            assert sum(inner, []) == words[: 75 * chunks]
            assert all(row[0] == start and row[1 + len(part)] == end for row, part in zip(rows, inner, strict=True))


def test_more_than_an_engine_has(pipeline: StoryPipeline) -> None:
    narrow = ShapeRanges(2, 8, Range(64, 64), Range(64, 64)).letters()
    small = StoryPipeline(
        replace(pipeline.networks, letters=narrow), (pipeline.tokenizers.first, pipeline.tokenizers.second)
    )
    with pytest.raises(InputError) as caught:
        small.run(Story(PROMPTS), PLAN)
    assert str(caught.value) == (
        "the longest prompt's chunks (max_prompt_chunks): 3 asked for; this engine was built for 1 to 1; "
        "prompt_chunks 1 cuts texts at the end of the first"
    )
    with pytest.raises(InputError, match=r"frame 0: a text of [\d,]+ tokens fills \d+ chunks; expected at most 16"):
        pipeline.run(Story(("fox " * 8402,)), PLAN)
    with pytest.raises(InputError, match="prompt_chunks is 2; expected one of auto, 1"):
        replace(PLAN, prompt_chunks="2")
    with pytest.raises(InputError, match="max_prompt_chunks is 17; expected 16 or less"):
        ShapeRanges(2, 8, Range(64, 64), Range(64, 64), 17)


def test_an_engine_for_longer_prompts_draws_what_eager_draws(
    pipeline: StoryPipeline, controlled_checkpoint: Checkpoint, free_engine: StoredEngine
) -> None:
    """The engine has a ControlNet besides, which no frame here asks for."""
    asked = {"numerics": free_engine.identity.numerics, "ranges": ShapeRanges(1, 4, Range(64, 64), Range(64, 64), 3)}
    store = free_engine.folder.parent
    networks = open_networks(controlled_checkpoint, backend="onnxruntime", engine_dir=store, **asked)
    built = StoryPipeline(networks, controlled_checkpoint.load_tokenizers())
    for mine, expected in zip(draw(built), draw(pipeline), strict=True):
        assert max(errors_of_frames(mine, expected)) < TIGHT
