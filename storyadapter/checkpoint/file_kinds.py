"""What a weight file is, by its first bytes: whatever it is called, and whatever it should have been."""

import io
import pickletools
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
_MAX_OPCODES: Final = 1_000_000  # in it; a model of 2,000 tensors has 70,000
_PICKLES_BEFORE_1_6: Final = 5  # magic number, protocol, system, tensors, their keys; then the numbers
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
        with path.open("rb") as file:
            _check_pickles(path, file.read(_MAX_PICKLE), _PICKLES_BEFORE_1_6)
        return FileKind.PICKLE
    found, advice = _instead(head)
    raise CheckpointError(f"{path} holds no weights: it is {found}", advice=advice)


def _check_zip(path: Path) -> None:
    """Raises CheckpointError unless an archive is what `torch.save` writes, where nothing is packed and can swell."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            small = len(pickles) == 1 and pickles[0].file_size <= _MAX_PICKLE
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            data = archive.read(pickles[0]) if small and not packed else b""
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole PyTorch file or .zip archive", advice=_FETCH_AGAIN) from error
    if not pickles:
        first = entries[0].filename if entries else "nothing"
        raise CheckpointError(
            f"{path} is a .zip archive with {first} in it, not weights", advice="unpack it and give what is inside"
        )
    if len(pickles) > 1:
        raise CheckpointError(f"{path} holds {len(pickles)} data.pkl", expected="one, as torch.save writes it")
    if not small:
        raise CheckpointError(
            f"{path} describes its tensors in more than {_MAX_PICKLE >> 20} MiB", expected="a model's"
        )
    if packed:
        raise CheckpointError(f"{path} is a compressed archive", expected="a file as torch.save writes it")
    _check_pickles(path, data, 1)


def _check_pickles(path: Path, data: bytes, count: int) -> None:
    """Raises CheckpointError unless so many pickles end within `data`, after no more opcodes than are soon read."""
    file, opcodes = io.BytesIO(data), 0
    try:
        for _ in range(count):
            for _ in pickletools.genops(file):
                opcodes += 1
                if opcodes > _MAX_OPCODES:
                    raise CheckpointError(
                        f"{path} describes its tensors in more than {_MAX_OPCODES:,} steps", expected="a model's"
                    )
    except ValueError as error:  # an opcode that is unknown or cut off
        if len(data) == _MAX_PICKLE:
            raise CheckpointError(
                f"{path} describes its tensors in more than {_MAX_PICKLE >> 20} MiB", expected="a model's"
            ) from error
        raise CheckpointError(f"{path} is not a whole PyTorch file", advice=_FETCH_AGAIN) from error


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
