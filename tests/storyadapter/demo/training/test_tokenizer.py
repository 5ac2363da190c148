"""The tokenizer files: known words are single tokens, anything else is spelled, nothing is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from storyadapter.demo.training.dataset import words
from storyadapter.demo.training.tokenizer import byte_letters, merges_for, vocabulary, words_of, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words(), "!")
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_the_world_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word


@settings(max_examples=50)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20))
def test_any_text_has_known_tokens_only(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    if "<|endoftext|>" not in text:
        assert tokenizer.unk_token_id not in ids[1:-1]


@given(st.sets(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=8))
def test_merges_spell_every_word_as_one_token_in_any_order(some: set[str]) -> None:
    merges = merges_for(some)
    assert merges == merges_for(sorted(some, reverse=True))
    for word in some:
        parts = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:  # as byte-pair encoding applies them: in the order of their rank
            n = 0
            while n < len(parts) - 1:
                if (parts[n], parts[n + 1]) == (left, right):
                    parts[n : n + 2] = [left + right]
                else:
                    n += 1
        assert parts == [word + "</w>"]


def test_the_end_token_has_the_highest_id_and_the_second_pad_the_lowest() -> None:
    ids, _ = vocabulary(["fox"])
    assert ids["<|endoftext|>"] == len(ids) - 1 == max(ids.values())
    assert ids["!"] == 0
    assert len(set(byte_letters())) == 256


def test_words_are_split_as_clip_splits_them() -> None:
    assert words_of(["A fox, 12 owls."]) == [",", ".", "1", "2", "a", "fox", "owls"]
