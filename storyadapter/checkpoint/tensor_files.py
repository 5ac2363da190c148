"""Tensors in `.safetensors` files and PyTorch pickles: names and shapes from the header, and the tensors themselves."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from storyadapter.checkpoint.file_kinds import FileKind, file_kind
from storyadapter.method.errors import CheckpointError, can_not_be_read, said

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of a pickle's nested dictionaries; those that are shared would else be written out once for each of their places.
_MAX_DEPTH: Final = 8
_MAX_TENSORS: Final = 100_000
_MAX_NAME: Final = 1000


def read_headers(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a file by name, on the meta device: shapes and dtypes, no weights read.

    Nested dictionaries, as in an IP-Adapter's `.bin`, are joined by dots, as they are in its `.safetensors`.

    Raises:
        CheckpointError: the file can't be read, is cut short, or holds anything but tensors.
    """
    import torch

    if (kind := file_kind(path)) is not FileKind.SAFETENSORS:
        return dict(_flatten(path, _unpickle(path, kind, "meta")))

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
    room. To a GPU, the tensors of a `.safetensors` file go without a mapping.

    Raises:
        CheckpointError: as for `read_headers`.
    """
    if (kind := file_kind(path)) is not FileKind.SAFETENSORS:
        pairs = ((name, t) for name, t in _flatten(path, _unpickle(path, kind, "cpu")) if wanted(name))
    elif device is not None and device.type == "cuda":
        pairs = _to_gpu(path, wanted, device)
    else:
        pairs = _safetensors(path, lambda file, name: file.get_tensor(name), wanted)
    return {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in pairs}


def _to_gpu(path: Path, wanted: Callable[[str], bool], device: "torch.device") -> "Iterator[tuple[str, Tensor]]":
    from storyadapter.checkpoint.gpu_reading import read_to_gpu

    list(_safetensors(path, lambda file, name: file.get_tensor(name), lambda name: False))  # its header is whole
    try:
        yield from read_to_gpu(path, wanted, device)
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text fields in a `.safetensors` header; empty for a pickle."""
    from safetensors import safe_open

    if file_kind(path) is not FileKind.SAFETENSORS:
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _safetensors(
    path: Path, get: "Callable[[Any, str], Tensor]", wanted: Callable[[str], bool] = lambda name: True
) -> "Iterator[tuple[str, Tensor]]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                if wanted(name):
                    yield name, get(file, name)
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    except (SafetensorError, RuntimeError, OverflowError, TypeError) as error:  # sizes that PyTorch can't count, too
        raise CheckpointError(f"{path} is not a whole .safetensors file ({said(error)}); fetch it again") from error


def _dtype(name: str) -> "torch.dtype":
    """The dtype of a safetensors header; everything that isn't floating point comes out as int64."""
    import torch

    floating = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floating |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    return floating.get(name, torch.int64)


def _unpickle(path: Path, kind: FileKind, device: str) -> Any:
    import torch

    try:
        with TemporaryDirectory() as folder:
            name = Path(folder) / "weights"  # torch.load goes by the name where that ends with ".safetensors"
            name.symlink_to(path.absolute())
            # Files older than PyTorch 1.6 are no zip archives and can't be mapped.
            return torch.load(name, map_location=device, mmap=kind is FileKind.ZIP, weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(f"{path} is not a whole PyTorch file; fetch it again") from error
        raise CheckpointError(
            f"{path} is a pickle that wants to run code ({code[1]}) and was not loaded", expected="tensors only"
        ) from error
    except OSError as error:
        raise CheckpointError(can_not_be_read(path, error)) from error
    except Exception as error:  # struct.error, KeyError, …: whatever damaged bytes lead the unpickler to
        raise CheckpointError(f"{path} is not a whole PyTorch file; fetch it again") from error


def _flatten(path: Path, content: Any) -> "Iterator[tuple[str, Tensor]]":
    """The tensors in nested dictionaries, by their keys joined with dots."""
    import torch

    found = 0
    left: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while left:
        keys, value = left.pop()
        name = ".".join(keys)
        if isinstance(value, dict) and len(keys) <= _MAX_DEPTH and len(name) <= _MAX_NAME:
            left += [((*keys, str(key)), item) for key, item in reversed(value.items())]
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
            found += 1
            yield name, value
        else:
            where = f" under {name[:_MAX_NAME]!r}" if name else ""
            raise CheckpointError(f"{path} holds a {type(value).__name__}{where}", expected="named tensors")
        if found + len(left) > _MAX_TENSORS:
            raise CheckpointError(f"{path} holds more than {_MAX_TENSORS:,} tensors", expected="a model's weights")
