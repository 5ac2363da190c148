"""What is told of a backend whose packages aren't there."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from storyadapter.engine import backend as backend_module
from storyadapter.engine.backends import BACKENDS

ONNX = {"onnx", "onnxruntime", "onnxscript"}
EITHER = (
    "type: pip install 'storyadapter-trt[tensorrt-rtx]' for an RTX GPU, or to build on any machine; "
    "pip install 'storyadapter-trt[tensorrt]' for a data-centre GPU"
)


@pytest.mark.parametrize(
    ("name", "installed", "told"),
    [
        ("tensorrt", ONNX, f"tensorrt-rtx or tensorrt not installed; {EITHER}"),
        (
            "tensorrt",
            set(),
            f"tensorrt-rtx or tensorrt and onnx and onnxruntime and onnxscript not installed; {EITHER}",
        ),
        (
            "tensorrt",
            {"tensorrt-rtx", "onnx"},
            "onnxruntime and onnxscript not installed; type: pip install 'storyadapter-trt[onnxruntime]'",
        ),
        ("tensorrt", ONNX | {"tensorrt"}, None),
        ("tensorrt", ONNX | {"tensorrt-rtx"}, None),
        (
            "onnxruntime",
            {"onnx", "onnxscript"},
            "onnxruntime not installed; type: pip install 'storyadapter-trt[onnxruntime]'",
        ),
    ],
)
def test_the_extra_that_installs_what_is_missing_is_told(
    name: str, installed: set[str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "installed_version", lambda package: "1.0" if package in installed else None)
    assert BACKENDS[name].why_unavailable(to_build=True) == told


def test_the_extras_install_what_backends_need() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for backend in BACKENDS.values():
        needed = {*backend.packages, *backend.build_packages} - {"torch"}
        assert needed == {requirement.split(">")[0] for requirement in extras.get(backend.extra, ())}
        for package, _ in backend.one_of:
            requirements = [requirement.split(">")[0] for requirement in extras[package]]
            assert package in requirements and f"storyadapter-trt[{backend.extra}]" in requirements


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["bench", "engine", "export", "storyadapter"])
def test_nobody_compares_names_of_backends(folder: str) -> None:
    """What differs from backend to backend is said by its object; only its own folder may know its name."""
    compared = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare | ast.MatchValue):
                continue
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & BACKENDS.keys()
            if names - {path.relative_to(ROOT / folder).parts[0]}:
                compared.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {', '.join(sorted(names))}")
    assert compared == []


def test_what_all_backends_are_imports_nothing_heavy() -> None:
    """Help lists them."""
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy"}
    program = "import sys, storyadapter.engine.backends; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not heavy & set(found.stdout.split())
