"""Headers and tensors of `.safetensors` and pickles, and what corrupt and hostile files give."""

import json
import os
import pickle
import re
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from storyadapter.checkpoint.tensor_files import read_headers, read_metadata, read_tensors
from storyadapter.method.errors import CheckpointError
from tests.permissions import without_permission
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
    with pytest.raises(CheckpointError, match="(is not a whole|holds no weights: it is empty).*fetch it again"):
        read(file)


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
BEGINNINGS = (
    b"",
    b"PK\x03\x04",
    LEGACY,
    b"\x80\x04",
    b"\x02\0\0\0\0\0\0\0{}",
    b"\x20\0\0\0\0\0\0\0{",
    b"GGUF",
    b"<html>",
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(deadline=timedelta(seconds=10))
@given(beginning=st.sampled_from(BEGINNINGS), data=st.binary(max_size=200))
def test_any_bytes_are_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, beginning: bytes, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(beginning + data)
    try:
        read_headers(path)
        read_metadata(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and not str(error).endswith(":")
    else:
        assert beginning + data == BEGINNINGS[4]  # no tensors, but whole


HEADERS = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "?"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, 2**64 - 1]), max_size=4),
            "data_offsets": st.tuples(st.integers(0, 8), st.integers(0, 8)),
        }
    ),
    max_size=3,
)


@settings(deadline=timedelta(seconds=10))
@given(header=HEADERS, data=st.binary(max_size=8))
def test_any_header_is_read_or_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, header: dict, data: bytes
) -> None:
    path, text = tmp_path_factory.getbasetemp() / "any.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for read in (read_headers, read_tensors):
        try:
            assert read(path).keys() == header.keys() - {"__metadata__"}
        except CheckpointError as error:
            assert "\n" not in str(error)


FETCH = "; fetch it again"
# what a file begins with -> what is told of it
NO_WEIGHTS = {
    "a git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 6938078334\n",
        "it is a git-lfs pointer, which stands for the file; type git lfs pull in the folder of its repository",
    ),
    "a page": (b"<!DOCTYPE html>\n<html>", "it is a web page; fetch the file itself, not the page that shows it"),
    "another page": (b"\xef\xbb\xbf\n <HTML lang=en>", "it is a web page; fetch the file itself"),
    "GGUF": (b"GGUF\x03\0\0\0", "it is a GGUF file of quantized weights; give the .safetensors files"),
    "gzip": (b"\x1f\x8b\x08", "it is a gzip archive; unpack it"),
    "tar": (b"unet/\0" + bytes(251) + b"ustar\x0000", "it is a tar archive; unpack it"),
    "JSON": (b'{"error": "Repository not found"}', "it is JSON text; give the file with the weights"),
    "zeros": (bytes(4096), "it is all zeros at its beginning, a download that broke off" + FETCH),
    "nothing": (b"", "it is empty" + FETCH),
    "text": (b"Entry not found", "it is neither .safetensors nor a PyTorch file" + FETCH),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_what_is_no_weights_is_told_as_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    content, told = NO_WEIGHTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} holds no weights: {told}")):
        read_headers(tmp_path / name)


@pytest.mark.parametrize("suffix", ["SAFETENSORS", "bin", "ckpt", "safetensors.download"])
def test_the_name_of_a_file_decides_nothing(tmp_path: Path, suffix: str) -> None:
    save_file(TENSORS, tmp_path / f"a.{suffix}", metadata={"by": "us"})
    torch.save(TENSORS, tmp_path / f"b.{suffix}")
    torch.save(TENSORS, tmp_path / "c.safetensors")
    for name in (f"a.{suffix}", f"b.{suffix}", "c.safetensors"):
        assert read_headers(tmp_path / name).keys() == TENSORS.keys()
        assert torch.equal(read_tensors(tmp_path / name)["a"], TENSORS["a"])
        assert read_metadata(tmp_path / name) == ({"by": "us"} if name.startswith("a") else {})


def test_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model.safetensors", b"")
    with pytest.raises(CheckpointError, match=r"model.zip is a .zip archive with model.safetensors in it, not weights"):
        read_headers(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(CheckpointError, match="bomb.bin is a compressed archive; expected a file as torch.save"):
        read_headers(tmp_path / "bomb.bin")


def test_headers_that_take_too_long_to_read(tmp_path: Path) -> None:
    length = 20 << 20
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{".ljust(length))
    with pytest.raises(CheckpointError, match="has a header of 20 MiB; expected at most 16"):
        read_headers(tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/data.pkl", bytes(9 << 20))
    with pytest.raises(CheckpointError, match="describes its tensors in more than 8 MiB"):
        read_headers(tmp_path / "a.bin")


@pytest.mark.parametrize("packed", ["zip", "before-1.6"])
def test_pickles_that_take_too_long_to_read(tmp_path: Path, packed: str) -> None:
    """Of a file from before PyTorch 1.6, everything is one stream: nothing else bounds what comes before its end."""
    steps, path = b"\x80\x02" + b"N0" * (1 << 20) + b"N.", tmp_path / "a.bin"
    if packed == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", steps)
    else:
        path.write_bytes(LEGACY + b"\x80\x02K\x01." * 2 + steps)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"a.bin describes its tensors in more than 1,000,000 steps; expected a"):
        read_headers(path)
    path.write_bytes(LEGACY + b"\x80\x02K\x01." * 2 + b"\x80\x02X\xff\xff\xff\x0f" + bytes(9 << 20))
    with pytest.raises(CheckpointError, match=r"a.bin describes its tensors in more than 8 MiB; expected a model's"):
        read_headers(path)
    assert time.monotonic() - started < 10


def test_an_archive_with_several_pickles(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match=r"a.bin holds 2 data.pkl; expected one, as torch.save writes it"):
        read_headers(tmp_path / "a.bin")


def test_dictionaries_that_grow_while_they_are_read(tmp_path: Path) -> None:
    nested: dict = {"a": TENSORS["a"]}
    for _ in range(7):
        nested = {str(i): nested for i in range(10)}
    torch.save(nested, tmp_path / "wide.bin")
    for _ in range(20):
        nested = {"a": nested}
    torch.save(nested, tmp_path / "deep.bin")
    with pytest.raises(CheckpointError, match="holds more than 100,000 tensors"):
        read_headers(tmp_path / "wide.bin")
    with pytest.raises(CheckpointError, match=r"holds a dict under 'a\.a\.a.*; expected named tensors"):
        read_headers(tmp_path / "deep.bin")


def test_tensors_that_are_no_plain_arrays(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.bin")
    with pytest.raises(CheckpointError, match="holds a Tensor under 'a'; expected named tensors"):
        read_headers(tmp_path / "sparse.bin")


@pytest.mark.parametrize("read", [read_headers, read_tensors, read_metadata])
def test_the_systems_own_reason(tmp_path: Path, read) -> None:
    loop, pipe = tmp_path / "loop.safetensors", tmp_path / "pipe.safetensors"
    loop.symlink_to(loop)
    os.mkfifo(pipe)  # reading it would never end
    for path, told in (
        (tmp_path / "gone.safetensors", "can't be read: No such file or directory"),
        (loop, "can't be read: Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "can't be read: File name too long"),
        (tmp_path, "is a folder; expected a file with weights"),
        (pipe, "is no regular file; expected a file with weights"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"{path} {told}")):
            read(path)
    save_file(TENSORS, tmp_path / "locked.safetensors")
    with without_permission(tmp_path), pytest.raises(CheckpointError, match="can't be read: Permission denied"):
        read(tmp_path / "locked.safetensors")


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
