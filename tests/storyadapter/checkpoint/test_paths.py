"""What was typed, and which files are taken: variants, shards, pickles, hub names."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.checkpoint import LoraSpec
from storyadapter.checkpoint.paths import DIFFUSERS_STEMS, find, read_config, weight_files
from storyadapter.cli.options import typed
from storyadapter.method.errors import CheckpointError, InputError
from tests.refusals import raises_typed

STEM = DIFFUSERS_STEMS[0]


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("there", "variant", "taken"),
    [
        ((".safetensors",), None, ".safetensors"),
        ((".bin",), None, ".bin"),
        ((".safetensors", ".bin", ".fp16.safetensors"), None, ".safetensors"),
        ((".fp16.safetensors",), None, ".fp16.safetensors"),
        ((".fp16.bin",), None, ".fp16.bin"),
        ((".fp16.bin", ".bin"), None, ".bin"),
        ((".safetensors", ".fp16.safetensors"), "fp16", ".fp16.safetensors"),
        ((".safetensors", ".fp16.bin"), "fp16", ".fp16.bin"),
        ((".safetensors",), "fp16", ".safetensors"),  # many folders have the variant for some networks only
        ((".ema.safetensors", ".fp16.safetensors"), "ema", ".ema.safetensors"),
    ],
)
def test_variants(tmp_path: Path, there: tuple[str, ...], variant: str | None, taken: str) -> None:
    make(tmp_path, *(STEM + suffix for suffix in there))
    assert weight_files(tmp_path, DIFFUSERS_STEMS, variant) == (tmp_path / (STEM + taken),)


def shard(folder: Path, infix: str = "", suffix: str = "safetensors") -> tuple[Path, ...]:
    shards = [f"{STEM}{infix}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    make(folder, *shards)
    index = folder / f"{STEM}.{suffix}.index{infix}.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}))
    return (index, *(folder / name for name in shards))


@pytest.mark.parametrize("infix", ["", ".fp16"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, infix: str, suffix: str) -> None:
    files = shard(tmp_path, infix, suffix)
    assert weight_files(tmp_path, DIFFUSERS_STEMS, None) == files


def test_several_variants(tmp_path: Path) -> None:
    make(tmp_path, f"{STEM}.ema.safetensors")
    shard(tmp_path, ".fp16")
    with raises_typed(CheckpointError, match="variants ema, fp16 only; say which one with --variant"):
        weight_files(tmp_path, DIFFUSERS_STEMS, None)


def test_no_weights(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", f"{STEM}-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=f"has no weights; expected {STEM}.safetensors or {STEM}.bin"):
        weight_files(tmp_path, DIFFUSERS_STEMS, "fp16")


def test_missing_shard(tmp_path: Path) -> None:
    shard(tmp_path)[2].unlink()
    with pytest.raises(CheckpointError, match="-00002-of-00002.safetensors is missing; .* lists 2 shards"):
        weight_files(tmp_path, DIFFUSERS_STEMS, None)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_index_without_map(tmp_path: Path, index: dict) -> None:
    shard(tmp_path)[0].write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to files; the file is corrupt"):
        weight_files(tmp_path, DIFFUSERS_STEMS, None)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "inner/a.safetensors"])
def test_shard_elsewhere(tmp_path: Path, name: str) -> None:
    shard(tmp_path)[0].write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="expected files beside it"):
        weight_files(tmp_path, DIFFUSERS_STEMS, None)


@given(data=st.binary(max_size=60))
def test_any_bytes_as_configuration(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_config(path), dict)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a JSON list; expected an object"),
    ],
)
def test_corrupt_configuration(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=found):
        read_config(tmp_path / "config.json")


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing"):
        read_config(tmp_path / "config.json")


def test_configuration_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read: "):
        read_config(tmp_path)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with the file sdxl/model.bin of owner/name in it.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--owner--name", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "sdxl").mkdir(parents=True)
    (repo / "snapshots" / commit / "sdxl" / "model.bin").write_bytes(b"")
    return repo / "snapshots" / commit


def test_hub_name_in_the_cache(hub_cache: Path) -> None:
    assert find("base_model", "owner/name").resolve() == hub_cache.resolve()
    assert find("ip_adapter", "owner/name/sdxl/model.bin").resolve() == (hub_cache / "sdxl" / "model.bin").resolve()


def test_hub_name_that_is_not_in_the_cache(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        find("base_model", "owner/other")
    assert typed(raised.value) == (
        "--base-model owner/other: there is no such file or folder, and no model of that name in the local Hugging "
        "Face cache; give a path, or fetch it first: hf download owner/other"
    )


def test_file_that_is_not_in_the_cached_model(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/name is in the local .* cache, but without sdxl/a.bin; fetch it"):
        find("ip_adapter", "owner/name/sdxl/a.bin")


@pytest.mark.parametrize("name", ["nothing", "/no/such/path", "a b/c", "-/--"])
def test_no_path_and_no_hub_name(hub_cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        find("base_model", name)


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
