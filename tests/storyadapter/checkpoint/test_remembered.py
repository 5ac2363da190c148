"""What is remembered of a model's files between processes, and what else may lie in its place."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from storyadapter.checkpoint import remembered as module
from storyadapter.checkpoint.remembered import digest_of, remembered

VALUE = {"shapes": {"a": [1, 2]}, "none": None, "text": "é"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "storyadapter-trt" / "remembered"


def never() -> None:
    raise AssertionError("it was made again")


def test_what_was_made_is_there_in_the_next_process(folder: Path) -> None:
    assert remembered("outline", digest_of("x"), lambda: VALUE) == VALUE
    assert remembered("outline", digest_of("x"), never) == VALUE
    assert remembered("outline", digest_of("y"), lambda: 2) == 2
    assert len(list(folder.iterdir())) == 2


def test_keys_tell_parts_apart() -> None:
    assert len({digest_of("ab", "c"), digest_of("a", "bc"), digest_of(b"ab", "c"), digest_of(["ab", "c"])}) == 4


def test_with_other_libraries_it_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered("outline", digest_of("x"), lambda: 1)
    monkeypatch.setattr(module, "_versions", lambda: ["diffusers 0.0"])
    assert remembered("outline", digest_of("x"), lambda: 2) == 2


def test_damage_is_never_read(folder: Path) -> None:
    remembered("outline", digest_of("x"), lambda: VALUE)
    (path,) = folder.iterdir()
    right, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        wrong, place = bytearray(right), rng.randrange(len(right))
        wrong[place] ^= 1 << rng.randrange(8)
        path.write_bytes(wrong[: rng.choice((place, len(wrong)))])
        assert remembered("outline", digest_of("x"), lambda: VALUE) == VALUE
        assert path.read_bytes() == right
    path.unlink()
    path.mkdir()
    assert remembered("outline", digest_of("x"), lambda: VALUE) == VALUE


def test_where_nothing_can_be_written_it_is_made_each_time(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder belongs")
    for value in (1, 2):
        assert remembered("outline", digest_of("x"), lambda value=value: value) == value


def test_what_was_used_longest_ago_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    for number in range(3):
        remembered("n", digest_of(number), lambda number=number: number)
        os.utime(max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns), (number, number))
    assert remembered("n", digest_of(0), never) == 0  # used now
    remembered("n", digest_of(3), lambda: 3)
    assert sorted(json.loads(path.read_bytes()[64:]) for path in folder.iterdir()) == [0, 2, 3]


OPEN = """
import sys
from pathlib import Path
from storyadapter.checkpoint import Checkpoint
model = Path(sys.argv[1])
parts = {"image_encoder": model / "image_encoder", "ip_adapter": model / "ip-adapter.safetensors"}
Checkpoint.open(base_model=model, **parts).load_tokenizers()[0].ids("a fox")
print([name for name in ("diffusers", "transformers", "accelerate", "torch._dynamo") if name in sys.modules])
"""


def test_a_model_that_was_opened_before_needs_no_large_library(folder: Path, tiny_model_dir: Path) -> None:
    found = [
        subprocess.run([sys.executable, "-c", OPEN, tiny_model_dir], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert "diffusers" in found[0].stdout and found[1].stdout == "[]\n"
