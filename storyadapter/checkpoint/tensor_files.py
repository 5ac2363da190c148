"""Tensors in `.safetensors` files and PyTorch pickles: names and shapes from the header, and the tensors themselves."""

import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from storyadapter.method.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def read_headers(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a file by name, on the meta device: shapes and dtypes, no weights read.

    Nested dictionaries, as in an IP-Adapter's `.bin`, are joined by dots, as they are in its `.safetensors`.

    Raises:
        CheckpointError: the file can't be read, is cut short, or holds anything but tensors.
    """
    import torch

    if not is_safetensors(path):
        return _flatten(path, _unpickle(path, "meta"))

    def header(file: Any, name: str) -> torch.Tensor:
        piece = file.get_slice(name)
        return torch.empty(piece.get_shape(), dtype=_dtype(piece.get_dtype()), device="meta")

    return dict(_safetensors(path, header))


def read_tensors(
    path: Path,
    dtype: "torch.dtype | None" = None,
    wanted: Callable[[str], bool] = lambda name: True,
    device: "torch.device | None" = None,
) -> "dict[str, Tensor]":
    """The wanted tensors of a file by name, in `dtype` (floating-point ones; None keeps each as it is), on `device`.

    Tensors that need no conversion and stay on the CPU stay mapped to the file. The others are converted and moved one
    by one, so that beside the result only pages of the file are in memory, which the system drops when it needs the
    room.

    Raises:
        CheckpointError: as for `read_headers`.
    """
    if is_safetensors(path):
        pairs = _safetensors(path, lambda file, name: file.get_tensor(name), wanted)
    else:
        pairs = ((name, t) for name, t in _flatten(path, _unpickle(path, "cpu")).items() if wanted(name))
    return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in pairs}


def read_metadata(path: Path) -> dict[str, str]:
    """The text fields in a `.safetensors` header; empty for a pickle."""
    from safetensors import safe_open

    if not is_safetensors(path):
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _safetensors(
    path: Path, get: "Callable[[Any, str], Tensor]", wanted: Callable[[str], bool] = lambda name: True
) -> "Iterator[tuple[str, Tensor]]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                if wanted(name):
                    yield name, get(file, name)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole .safetensors file ({first_line(error)}); fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or first_line(error)}") from error


def _dtype(name: str) -> "torch.dtype":
    """The dtype of a safetensors header; everything that isn't floating point comes out as int64."""
    import torch

    floating = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floating |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    return floating.get(name, torch.int64)


def _unpickle(path: Path, device: str) -> Any:
    import torch

    try:
        # Files older than PyTorch 1.6 are no zip archives and can't be mapped.
        return torch.load(path, map_location=device, mmap=zipfile.is_zipfile(path), weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(f"{path} is not a whole PyTorch file; fetch it again") from error
        raise CheckpointError(
            f"{path} is a pickle that wants to run code ({code[1]}) and was not loaded", expected="tensors only"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # struct.error, KeyError, …: whatever damaged bytes lead the unpickler to
        raise CheckpointError(f"{path} is not a whole PyTorch file; fetch it again") from error


def _flatten(path: Path, value: Any, prefix: str = "") -> "dict[str, Tensor]":
    import torch

    if isinstance(value, torch.Tensor):
        return {prefix: value}
    if not isinstance(value, dict):
        where = f" under {prefix!r}" if prefix else ""
        raise CheckpointError(f"{path} holds a {type(value).__name__}{where}", expected="named tensors")
    flat: dict[str, Tensor] = {}
    for key, item in value.items():
        flat |= _flatten(path, item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
