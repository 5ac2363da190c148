"""Text conditioning: each text once, in groups that follow from its story alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.opening import open_networks
from storyadapter.model.contract import text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import TextCache, Tokenizers, text_bytes
from storyadapter.runtime.jobs import TextGroup
from tests.storyadapter.runtime.replaced import counting

PROMPTS = ("a fox", "an owl in the snow", "a bear")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> tuple[Networks, Tokenizers]:
    return open_networks(checkpoint), Tokenizers(*checkpoint.load_tokenizers())


def encode(model: tuple[Networks, Tokenizers], texts: tuple[str, ...], height: int = 64, width: int = 96) -> list:
    group = TextGroup(texts, height, width)
    return TextCache(*model).take([(group, index) for index in range(len(texts))], keep=0)


def test_each_text_has_a_row_of_its_own(model: tuple[Networks, Tokenizers]) -> None:
    rows = encode(model, PROMPTS)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        (alone,) = encode(model, (prompt,))
        assert row.kv.keys() == {width.channels for width in model[0].geometry.widths}
        for channels, kv in row.kv.items():
            torch.testing.assert_close(kv, alone.kv[channels])
        torch.testing.assert_close(row.added_embedding, alone.added_embedding)
    assert not torch.equal(rows[0].added_embedding, rows[1].added_embedding)


def test_a_row_is_what_the_networks_give(model: tuple[Networks, Tokenizers]) -> None:
    networks, tokenizers = model
    ids, ids_2 = tokenizers.input_ids(PROMPTS)
    inputs = networks["text_encoder"]({"input_ids": ids}) | networks["text_encoder_2"]({"input_ids": ids_2})
    inputs["sizes"] = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]] * 3)
    outputs = networks["text_projection"](inputs)
    for index, row in enumerate(encode(model, PROMPTS)):
        assert torch.equal(row.added_embedding, outputs["added_embedding"][index])
        for channels, kv in row.kv.items():
            assert torch.equal(kv, outputs[text_kv_name(channels)][:, index])


def test_texts_are_kept_as_long_as_there_is_room_for_them(model: tuple[Networks, Tokenizers]) -> None:
    networks, counts = counting(model[0], "text_projection")
    cache = TextCache(networks, model[1])
    first, second = (TextGroup(texts, 64, 64) for texts in (PROMPTS[:2], PROMPTS[2:]))
    for place in ((first, 0), (second, 0), (first, 1)):
        cache.take([place], keep=3)
    assert counts["text_projection rows"] == 3
    kept = cache.take([(second, 0)], keep=1)  # the other one goes
    computed = cache.take([(first, 0)], keep=2)
    assert counts["text_projection rows"] == 3 + 2
    assert torch.equal(cache.take([(first, 0)], keep=2)[0].added_embedding, computed[0].added_embedding)
    cache.forget()
    again = cache.take([(second, 0)], keep=2)
    assert counts["text_projection rows"] == 3 + 2 + 1
    assert torch.equal(kept[0].added_embedding, again[0].added_embedding)


def test_sizes_matter_for_the_embedding_alone(model: tuple[Networks, Tokenizers]) -> None:
    row, other = encode(model, ("a fox",))[0], encode(model, ("a fox",), height=96, width=64)[0]
    assert not torch.equal(row.added_embedding, other.added_embedding)
    for channels, kv in row.kv.items():
        assert torch.equal(other.kv[channels], kv)


def test_the_size_of_the_keys_and_values(model: tuple[Networks, Tokenizers]) -> None:
    rows = encode(model, PROMPTS)
    assert text_bytes(model[0].geometry, torch.float32, 3) == sum(kv.nbytes for row in rows for kv in row.kv.values())


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=90))
def test_words_cut_off_are_the_end_that_does_not_fit(model: tuple[Networks, Tokenizers], words: list[str]) -> None:
    tokenizers = model[1]
    cut = tokenizers.words_cut_off(" ".join(words)).split()
    assert cut == words[len(words) - len(cut) :]
    kept = " ".join(words[: len(words) - len(cut)])
    assert len(tokenizers.first.ids(kept)) <= 77
    if cut:
        assert len(tokenizers.first.ids(f"{kept} {cut[0]}")) > 77
