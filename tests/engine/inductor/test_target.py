"""What is found out about compilers before a long build."""

import re
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from storyadapter.engine.inductor.target import (
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
    versions = compiler_versions(CPU)
    assert versions.startswith("torch 2.") and "triton" not in versions and " diffusers " in versions
