"""Headers and tensors of `.safetensors` and pickles, and what corrupt and hostile files give."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from storyadapter.checkpoint.tensor_files import read_headers, read_tensors
from storyadapter.method.errors import CheckpointError
from tests.storyadapter.checkpoint.spoil import cut_short

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.c": torch.ones(4, dtype=torch.float16),
    "n": torch.tensor([1, 2]),
}


@pytest.fixture(params=["safetensors", "zip", "before-1.6"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / ("x.safetensors" if request.param == "safetensors" else "x.bin")
    if request.param == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


def test_headers_have_shapes_and_no_data(file: Path) -> None:
    headers = read_headers(file)
    assert {name: (t.shape, t.dtype) for name, t in headers.items()} == {
        name: (t.shape, t.dtype) for name, t in TENSORS.items()
    }
    assert all(t.is_meta for t in headers.values())


def test_tensors_in_one_dtype(file: Path) -> None:
    tensors = read_tensors(file, torch.bfloat16)
    assert torch.equal(tensors["a"], TENSORS["a"].bfloat16())
    assert tensors["b.c"].dtype == torch.bfloat16
    assert torch.equal(tensors["n"], TENSORS["n"])


def test_wanted_tensors_only(file: Path) -> None:
    assert set(read_tensors(file, wanted=lambda name: name.startswith("b"))) == {"b.c"}


@pytest.mark.parametrize("read", [read_headers, read_tensors])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_cut_short(file: Path, read, keep: float) -> None:
    cut_short(file, keep)
    with pytest.raises(CheckpointError, match="is not a whole .*fetch it again"):
        read(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_told_in_one_line(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        read_headers(path)
    assert "\n" not in str(raised.value)


class Hostile:
    """Its pickle makes a folder when it is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, as_zip: bool) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "trace"
    torch.save({"a": TENSORS["a"], "b": Hostile(trace)}, path, _use_new_zipfile_serialization=as_zip)
    for read in (read_headers, read_tensors):
        with pytest.raises(CheckpointError, match=r"is a pickle that wants to run code \(posix\.mkdir\)"):
            read(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_pickle_with_code(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(CheckpointError):
        read_headers(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "holds a list; expected named tensors"),
        ({"epoch": 5}, "holds a int under 'epoch'; expected named tensors"),
    ],
)
def test_something_else_than_tensors(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=found):
        read_headers(tmp_path / "x.bin")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_gone(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match="can't be read: "):
        read_headers(tmp_path / f"x.{suffix}")
