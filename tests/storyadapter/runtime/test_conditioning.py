"""Text conditioning: one projection per micro-batch, bound to rows without copies per row."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine import open_networks
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import StoryText, Tokenizers, text_bytes

PROMPTS = ("a fox", "an owl in the snow", "a bear")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> tuple[Networks, Tokenizers]:
    return open_networks(checkpoint), Tokenizers(*checkpoint.load_tokenizers())


def encode(model: tuple[Networks, Tokenizers], negative: str | None, **options: Any) -> StoryText:
    return StoryText(*model, PROMPTS, negative_prompt=negative, **{"height": 64, "width": 96, **options})


def test_rows_of_a_micro_batch_read_their_prompts(model: tuple[Networks, Tokenizers]) -> None:
    text = encode(model, "bad")
    whole, bound = text.bind(range(3)), text.bind(range(1, 3))
    assert bound.text_row.tolist() == [0, 0, 1, 2]
    for channels, kv in whole.text_kv.items():
        torch.testing.assert_close(bound.text_kv[channels], kv[:, [0, 2, 3]])
        assert bound.text_kv[channels].is_contiguous()
        assert not torch.equal(kv[:, 1], kv[:, 2])
    torch.testing.assert_close(bound.added_embedding, whole.added_embedding[[0, 0, 4, 5]])


def test_without_guidance_there_is_no_unconditional_row(model: tuple[Networks, Tokenizers]) -> None:
    guided, bound = encode(model, "bad").bind(range(2)), encode(model, None).bind(range(2))
    assert bound.text_row.tolist() == [0, 1]
    for channels, kv in guided.text_kv.items():
        torch.testing.assert_close(bound.text_kv[channels], kv[:, 1:])
    torch.testing.assert_close(bound.added_embedding, guided.added_embedding[2:])


def test_text_that_is_not_kept_is_computed_again_and_the_same(model: tuple[Networks, Tokenizers]) -> None:
    calls: list[int] = []

    class Counting:
        spec = model[0]["text_projection"].spec

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            calls.append(len(inputs["sizes"]))
            return model[0]["text_projection"](inputs)

    counted = (replace(model[0], by_name={**model[0].by_name, "text_projection": Counting()}), model[1])
    kept, computed = encode(counted, "bad"), encode(counted, "bad", keep=False)
    for _ in range(2):
        for frames in (range(2), range(2, 3)):
            one, other = kept.bind(frames), computed.bind(frames)
            assert torch.equal(one.added_embedding, other.added_embedding)
            for channels, kv in one.text_kv.items():
                assert torch.equal(other.text_kv[channels], kv)
    assert calls == [3, 3, 2, 2, 3, 2]


def test_sizes_matter_for_the_embedding_alone(model: tuple[Networks, Tokenizers]) -> None:
    text, other = encode(model, "bad").bind(range(3)), encode(model, "bad", height=96, width=64).bind(range(3))
    assert not torch.equal(text.added_embedding, other.added_embedding)
    for channels, kv in text.text_kv.items():
        assert torch.equal(other.text_kv[channels], kv)


def test_the_size_of_the_keys_and_values(model: tuple[Networks, Tokenizers]) -> None:
    bound = encode(model, "bad").bind(range(3))
    assert text_bytes(model[0].geometry, torch.float32, 4) == sum(kv.nbytes for kv in bound.text_kv.values())


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=90))
def test_words_cut_off_are_the_end_that_does_not_fit(model: tuple[Networks, Tokenizers], words: list[str]) -> None:
    tokenizers = model[1]
    cut = tokenizers.words_cut_off(" ".join(words)).split()
    assert cut == words[len(words) - len(cut) :]
    kept = " ".join(words[: len(words) - len(cut)])
    assert len(tokenizers.first(kept, verbose=False).input_ids) <= 77
    if cut:
        assert len(tokenizers.first(f"{kept} {cut[0]}", verbose=False).input_ids) > 77
