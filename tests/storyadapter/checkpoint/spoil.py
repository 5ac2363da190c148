"""Typing the tiny model's paths, changing its files, and expecting the one line that tells of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.cli.options import typed
from storyadapter.method.errors import CheckpointError


def tiny_paths(folder: Path, **typed: Any) -> CheckpointPaths:
    """The model in `folder`, with what else is typed."""
    paths = {
        "base_model": folder,
        "image_encoder": folder / "image_encoder",
        "ip_adapter": folder / "ip-adapter.safetensors",
    }
    return CheckpointPaths(**(paths | typed))


def refuses(pattern: str, paths: CheckpointPaths) -> None:
    """`Checkpoint.open` must raise one line in which every part of `pattern` (split at " … ") is found in order."""
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(paths)
    message = typed(raised.value)
    assert re.search(".*".join(re.escape(part) for part in pattern.split(" … ")), message), message
    assert "\n" not in message
    assert raised.value.exit_code == 2


def edit_config(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a `.safetensors` file after `change` worked on its tensors in place."""
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def cut_short(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def write_header_only(path: Path, tensors: dict[str, Tensor]) -> None:
    """A `.safetensors` file of the full length whose data is a hole: it takes no space on the disk.

    Layout: https://github.com/huggingface/safetensors#format
    """
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
