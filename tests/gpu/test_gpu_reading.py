"""Weights that are read straight to a GPU are those of the file, in every type."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storyadapter.checkpoint import gpu_reading
from storyadapter.checkpoint.tensor_files import read_tensors
from storyadapter.method.errors import CheckpointError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
SHAPES = ((), (0,), (1,), (7, 3), (320, 4, 3, 3), (1000, 1001))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_arrives_is_what_was_written(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_reading, "_CHUNK", 99_999)  # so that tensors are longer than a chunk
    generator = torch.Generator().manual_seed(0)
    written = {
        f"{kind}{shape}": (torch.randn(shape, generator=generator) * 1e3).to(kind) for kind in TYPES for shape in SHAPES
    }
    save_file(written, tmp_path / "x.safetensors", {"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors", dtype, lambda name: "bool" not in name, CUDA)
    assert read.keys() == {name for name in written if "bool" not in name}
    for name, tensor in read.items():
        expected = written[name].to("cpu", dtype if written[name].is_floating_point() else None)
        assert tensor.device.type == "cuda" and torch.equal(tensor.cpu(), expected)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nobody else's memory


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        list(gpu_reading.read_to_gpu(path, lambda name: True, CUDA))
    with pytest.raises(CheckpointError, match="is not a whole .safetensors file"):
        read_tensors(path, device=CUDA)
