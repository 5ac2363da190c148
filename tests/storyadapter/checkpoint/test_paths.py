from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.checkpoint import LoraSpec
from storyadapter.method.errors import InputError


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1e-1", "style.safetensors", -0.1),
        ("style.safetensors:.5", "style.safetensors", 0.5),
        ("style.safetensors:2.", "style.safetensors", 2.0),
        ("C:/loras/style.safetensors", "C:/loras/style.safetensors", 1.0),
        ("C:/loras/style.safetensors:0", "C:/loras/style.safetensors", 0.0),
        ("owner/name", "owner/name", 1.0),
        ("a:b:c", "a:b:c", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:", "a:", 1.0),
        ("a:1:1.0", "a:1", 1.0),
    ],
)
def test_path_and_scale(text: str, path: str, scale: float) -> None:
    assert LoraSpec.parse(text) == LoraSpec(Path(path), scale)


@given(
    st.text(min_size=1).filter(lambda text: "\0" not in text),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_every_path_can_be_typed_with_a_scale(path: str, scale: float) -> None:
    spec = LoraSpec(Path(path), scale)
    assert LoraSpec.parse(str(spec)) == spec


@given(st.text(alphabet="ab/.:0123456789-+e", min_size=1))
def test_text_is_a_path_or_a_path_and_a_number(text: str) -> None:
    try:
        spec = LoraSpec.parse(text)
    except InputError:
        path, _, number = text.rpartition(":")
        assert not path or float(number) in (float("inf"), float("-inf"))
        return
    if spec.path != Path(text):
        path, _, number = text.rpartition(":")
        assert (spec.path, spec.scale) == (Path(path), float(number))
    else:
        assert spec.scale == 1.0 or text == f"{spec.path}:{text.rpartition(':')[2]}"


@pytest.mark.parametrize("text", ["", ":0.5"])
def test_no_path(text: str) -> None:
    with pytest.raises(InputError, match="has no path; expected PATH or PATH:SCALE"):
        LoraSpec.parse(text)


def test_scale_beyond_numbers() -> None:
    with pytest.raises(InputError, match="the scale 1e999 is too large"):
        LoraSpec.parse("a:1e999")
