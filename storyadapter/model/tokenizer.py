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

    def padded(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """As many tokens of each text: of a longer one the first and the one that ends it, a shorter one filled up."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        cut = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
        return [row + [self._padding] * (length - len(row)) for row in cut]
