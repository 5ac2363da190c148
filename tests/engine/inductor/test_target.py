"""What is found out about compilers before a long build."""

import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from storyadapter.engine.inductor.target import (
    build_options,
    check_compilers,
    compiler_versions,
    target_architecture,
)
from storyadapter.method.errors import UnavailableError

CPU = torch.device("cpu")


def compiler(folder: Path, answer: str) -> str:
    """A compiler that answers as g++ does where it finds, or doesn't find, a library."""
    path = folder / "g++-that-answers"
    path.write_text(f"#!/bin/sh\necho {answer}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machines_compiler_serves() -> None:
    check_compilers(CPU)


def test_a_compiler_without_a_shared_library_is_told(tmp_path: Path) -> None:
    with config.patch({"cpp.cxx": (compiler(tmp_path, "libstdc++.so"),)}):
        expected = "finds no shared libstdc++.so, and a package with a static one crashes when it is loaded; expected"
        with pytest.raises(UnavailableError, match=re.escape(expected)):
            check_compilers(CPU)


def test_no_compiler_at_all_is_told(tmp_path: Path) -> None:
    expected = "needs a C++ compiler to build, and none is there; expected g++, or CXX naming another"
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}),
        pytest.raises(UnavailableError, match=re.escape(expected)),
    ):
        check_compilers(CPU)


def test_the_target_names_processor_and_versions() -> None:
    assert re.fullmatch(r"cpu-\w+-\w+", target_architecture(CPU))
    assert compiler_versions(CPU).startswith("torch 2.") and "triton" not in compiler_versions(CPU)


def test_other_tiles_make_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    (tmp_path / "tiles.json").write_text("{}")
    shipped = build_options(gpu)
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    tuned = build_options(gpu)
    assert dict(shipped).keys() == dict(tuned).keys() == {"build", "tiles"} and shipped != tuned
    assert dict(build_options(CPU)).keys() == {"build"}
