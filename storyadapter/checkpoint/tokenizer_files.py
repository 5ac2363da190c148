"""A checkpoint's tokenizers: their files, as transformers reads them."""

from pathlib import Path
from typing import Any

from storyadapter.checkpoint.paths import is_there
from storyadapter.checkpoint.remembered import digest_of, remembered
from storyadapter.method.errors import CheckpointError, can_not_be_read, said
from storyadapter.model.tokenizer import TextTokenizer

_VOCABULARY = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"  # the vocabulary and everything else in one file
_MAX_VOCABULARY = 32 << 20  # bytes; CLIP's have 3 MB at the most
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer(folder: Path, vocabulary_size: int) -> TextTokenizer:
    """A tokenizer, whose tokens the text encoder all knows.

    Raises:
        CheckpointError: it can't be read, or has others.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > vocabulary_size:
        raise CheckpointError(
            f"{folder} has {tokenizer.size} tokens, its text encoder knows {vocabulary_size}",
            expected="the tokenizer that belongs to the model",
        )
    return tokenizer


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that are there."""
    return tuple(folder / name for name in (*_VOCABULARY, _WHOLE, *_TOKENIZER_SETTINGS) if is_there(folder / name))


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Raises CheckpointError if files are missing or corrupt."""
    from tokenizers import Tokenizer

    missing = [name for name in _VOCABULARY if not is_there(folder / name)]
    if missing and not is_there(folder / _WHOLE):
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}", expected="the tokenizer of an SDXL folder")
    contents = [(path.name, _tokenizer_file(path)) for path in tokenizer_files(folder)]

    def make() -> dict[str, Any]:
        """As transformers reads it."""
        from transformers import CLIPTokenizer

        read = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        whole = read.backend_tokenizer.to_str()
        return {"tokenizer": whole, "end": read.eos_token_id, "padding": read.pad_token_id, "size": len(read)}

    try:
        found = remembered("tokenizer", digest_of(*(part for pair in contents for part in pair)), make)
        tokenizer = Tokenizer.from_str(found.pop("tokenizer"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not all(isinstance(value, int) for value in found.values()):
            raise ValueError("it has no token that ends a text, or none to fill one up")
        return TextTokenizer(tokenizer, **found)
    except Exception as error:  # whatever a corrupt vocabulary makes the tokenizers library raise
        raise CheckpointError(f"{folder} holds no readable CLIP tokenizer: {said(error)}") from error


def _tokenizer_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder", expected="a file of a tokenizer")
        if not path.is_file():  # reading a pipe or a device may never end
            raise CheckpointError(f"{path} is no regular file", expected="a file of a tokenizer")
        with path.open("rb") as file:
            data = file.read(_MAX_VOCABULARY + 1)
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    if len(data) > _MAX_VOCABULARY:
        found = f"{path} is longer than {_MAX_VOCABULARY >> 20} MiB"
        raise CheckpointError(found, expected="a file of CLIP's tokenizer")
    return data
