"""What a weight file is, by its first bytes: whatever it is called, and whatever it should have been."""

import re
import stat
import zipfile
from enum import Enum
from pathlib import Path
from typing import Final

from storyadapter.method.errors import CheckpointError, can_not_be_read

_HEAD: Final = 512
_HEADER_LIMIT: Final = 100_000_000  # of a .safetensors file, https://github.com/huggingface/safetensors#format
# Ten times what the largest models have: more takes longer to read than anybody waits for.
_MAX_HEADER: Final = 16 << 20  # bytes of a .safetensors file's header
_MAX_PICKLE: Final = 8 << 20  # of the part of a PyTorch file that isn't numbers
_FETCH_AGAIN: Final = "fetch it again"


class FileKind(Enum):
    """The kinds of files that hold weights."""

    SAFETENSORS = "safetensors"
    ZIP = "a PyTorch file"
    PICKLE = "a PyTorch file from before PyTorch 1.6"


def file_kind(path: Path) -> FileKind:
    """What a weight file is.

    Raises:
        CheckpointError: it can't be read, or is none; the text says what it is instead, and what helps.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a folder", expected="a file with weights")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise CheckpointError(f"{path} is no regular file", expected="a file with weights")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    if (length := int.from_bytes(head[:8], "little")) <= _HEADER_LIMIT and head[8:9] == b"{":
        if status.st_size < 8 + length:
            raise CheckpointError(
                f"{path} is not a whole .safetensors file (its header is cut off)", advice=_FETCH_AGAIN
            )
        if length > _MAX_HEADER:
            found = f"{path} has a header of {length >> 20} MiB"
            raise CheckpointError(found, expected=f"at most {_MAX_HEADER >> 20}, far more than a model's")
        return FileKind.SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return FileKind.ZIP
    if re.match(rb"\x80[\x02-\x05]", head):
        return FileKind.PICKLE
    found, advice = _instead(head)
    raise CheckpointError(f"{path} holds no weights: it is {found}", advice=advice)


def _check_zip(path: Path) -> None:
    """Raises CheckpointError unless an archive is what `torch.save` writes, where nothing is packed and can swell."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole PyTorch file or .zip archive", advice=_FETCH_AGAIN) from error
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        first = entries[0].filename if entries else "nothing"
        raise CheckpointError(
            f"{path} is a .zip archive with {first} in it, not weights", advice="unpack it and give what is inside"
        )
    if any(entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE for entry in entries):
        raise CheckpointError(
            f"{path} describes its tensors in more than {_MAX_PICKLE >> 20} MiB", expected="a model's"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is a compressed archive", expected="a file as torch.save writes it")


def _instead(head: bytes) -> tuple[str, str]:
    """What a file is that holds no weights, and what helps."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty", _FETCH_AGAIN
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, which stands for the file", "type git lfs pull in the folder of its repository"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page", "fetch the file itself, not the page that shows it (of a hub: hf download)"
    if head.startswith(b"GGUF"):
        return "a GGUF file of quantized weights", "give the .safetensors files that it was made from"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"7z\xbc\xaf", "7z"), (b"Rar!", "rar"), (b"\xfd7zXZ", "xz")):
        if head.startswith(magic):
            return f"a {name} archive", "unpack it and give what is inside"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it and give what is inside"
    if not head.strip(b"\0"):
        return "all zeros at its beginning, a download that broke off", _FETCH_AGAIN
    if text.startswith((b"{", b"[")):
        return "JSON text", "give the file with the weights"
    return "neither .safetensors nor a PyTorch file", _FETCH_AGAIN
