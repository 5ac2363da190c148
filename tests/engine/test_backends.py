"""What is told of a backend whose packages aren't there."""

import tomllib
from pathlib import Path

import pytest

from storyadapter.engine import backends
from storyadapter.engine.backends import BACKENDS, why_unavailable

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
    monkeypatch.setattr(backends, "installed_version", lambda package: "1.0" if package in installed else None)
    assert why_unavailable(name, to_build=True) == told


def test_the_extras_install_what_backends_need() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for backend in BACKENDS.values():
        needed = {*backend.packages, *backend.build_packages} - {"torch"}
        assert needed == {requirement.split(">")[0] for requirement in extras.get(backend.extra, ())}
        for package, _ in backend.one_of:
            requirements = [requirement.split(">")[0] for requirement in extras[package]]
            assert package in requirements and f"storyadapter-trt[{backend.extra}]" in requirements
