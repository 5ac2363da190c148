"""Text to tokens: what is needed of a CLIP tokenizer, without the library that reads its files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """A CLIP tokenizer.

    Attributes:
        end: the token that ends a text.
        size: how many tokens it knows.
    """

    def __init__(self, tokenizer: "Tokenizer", *, end: int, padding: int, size: int) -> None:
        """
        Args:
            tokenizer: puts the tokens at a text's ends to it; neither cuts nor pads.
            padding: the token that texts are filled up with.
        """
        self._tokenizer = tokenizer
        self._padding = padding
        self.end, self.size = end, size

    def ids(self, text: str) -> list[int]:
        """All tokens of a text, with those at its ends."""
        return self._tokenizer.encode(text).ids

    def padded(self, texts: Sequence[str], length: int, chunks: int = 1) -> list[list[int]]:
        """So many rows of each text, one after the other, each with the tokens at its ends: of a longer text the
        first ones, of a shorter one filled up."""
        rows, most = [], length - 2
        for encoding in self._tokenizer.encode_batch(list(texts)):
            start, *words, end = encoding.ids
            parts = [words[most * chunk : most * (chunk + 1)] for chunk in range(chunks)]
            rows += [[start, *part, end] + [self._padding] * (most - len(part)) for part in parts]
        return rows
