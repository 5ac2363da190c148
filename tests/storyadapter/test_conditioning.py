"""Text conditioning: one projection per prompt, bound to rows without copies per row."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.checkpoint import Checkpoint
from storyadapter.conditioning import TextConditioning, Tokenizers, encode_text
from storyadapter.contract import Range
from storyadapter.engine import open_networks
from storyadapter.networks import Networks

PROMPTS = ("a fox", "an owl in the snow", "a bear")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> tuple[Networks, Tokenizers]:
    folder = tiny_model_dir
    paths = {"image_encoder": folder / "image_encoder", "ip_adapter": folder / "ip-adapter.safetensors"}
    checkpoint = Checkpoint.open(base_model=folder, **paths)
    return open_networks(checkpoint), Tokenizers(*checkpoint.load_tokenizers())


def encode(model: tuple[Networks, Tokenizers], negative: str | None) -> TextConditioning:
    return encode_text(*model, PROMPTS, negative_prompt=negative, height=64, width=96)


def test_rows_of_a_micro_batch_read_their_prompts(model: tuple[Networks, Tokenizers]) -> None:
    text = encode(model, "bad")
    bound = text.bind(range(1, 3))
    assert bound.text_row.tolist() == [0, 0, 1, 2]
    for channels, kv in text.text_kv.items():
        assert torch.equal(bound.text_kv[channels], kv[:, [0, 2, 3]])
        assert bound.text_kv[channels].is_contiguous()
    assert torch.equal(bound.added_embedding, text.added_embedding[[0, 0, 2, 3]])


def test_without_guidance_there_is_no_unconditional_row(model: tuple[Networks, Tokenizers]) -> None:
    text = encode(model, None)
    bound = text.bind(range(0, 2))
    assert bound.text_row.tolist() == [0, 1]
    assert torch.equal(bound.added_embedding, text.added_embedding[:2])


def test_encoding_in_parts_gives_the_same(model: tuple[Networks, Tokenizers]) -> None:
    networks, tokenizers = model
    narrow = replace(networks, letters={"P": Range(1, 2)})
    whole, parts = encode((networks, tokenizers), "bad"), encode((narrow, tokenizers), "bad")
    for channels, kv in whole.text_kv.items():
        torch.testing.assert_close(parts.text_kv[channels], kv)
    torch.testing.assert_close(parts.added_embedding, whole.added_embedding)


def test_prompts_and_sizes_matter(model: tuple[Networks, Tokenizers]) -> None:
    text = encode(model, "bad")
    other = encode_text(*model, PROMPTS, negative_prompt="bad", height=96, width=64)
    assert not torch.equal(text.added_embedding, other.added_embedding)
    for channels, kv in text.text_kv.items():
        assert torch.equal(other.text_kv[channels], kv)  # only the embedding knows the size
        assert not torch.equal(kv[:, 1], kv[:, 2])


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=90))
def test_words_cut_off_are_the_end_that_does_not_fit(model: tuple[Networks, Tokenizers], words: list[str]) -> None:
    tokenizers = model[1]
    cut = tokenizers.words_cut_off(" ".join(words)).split()
    assert cut == words[len(words) - len(cut) :]
    kept = " ".join(words[: len(words) - len(cut)])
    assert len(tokenizers.first(kept, verbose=False).input_ids) <= 77
    if cut:
        assert len(tokenizers.first(f"{kept} {cut[0]}", verbose=False).input_ids) > 77
