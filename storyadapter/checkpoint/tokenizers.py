"""The two CLIP tokenizers of a base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.checkpoint.tensor_files import first_line
from storyadapter.method.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_VOCABULARY = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"  # the vocabulary and everything else in one file
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """Check that a tokenizer can be read and that the text encoder knows all its tokens.

    Raises:
        CheckpointError: it can't, or doesn't.
    """
    found = len(load_tokenizer(folder))
    if found > vocabulary_size:
        raise CheckpointError(
            f"{folder} has {found} tokens, its text encoder knows {vocabulary_size}",
            expected="the tokenizer that belongs to the model",
        )


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that are there."""
    return tuple(folder / name for name in (*_VOCABULARY, _WHOLE, *_SETTINGS) if (folder / name).exists())


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """Raises CheckpointError if files are missing or corrupt."""
    from transformers import CLIPTokenizer

    missing = [name for name in _VOCABULARY if not (folder / name).exists()]
    if missing and not (folder / _WHOLE).exists():
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}", expected="the tokenizer of an SDXL folder")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a corrupt vocabulary makes the tokenizers library raise
        raise CheckpointError(f"{folder} holds no readable CLIP tokenizer: {first_line(error)}") from error
