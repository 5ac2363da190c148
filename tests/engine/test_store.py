"""The engine store: found by what was asked for, told by name what differs, and never a half-finished engine."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from storyadapter.cli.options import typed
from storyadapter.engine.identity import EngineIdentity, FusedLora, WeightFile, engine_key
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.method.errors import EngineMismatchError, InputError, RunError
from storyadapter.model.contract import Range, ShapeRanges
from tests.engine.engine_requests import (
    TEXT,
    UNET,
    VAE,
    digest,
    identity,
    never_waits,
    ranges,
    write_small,
)

COMMAND = "storyadapter-trt build --backend onnxruntime"
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def add(store: EngineStore, stored: EngineIdentity, shapes: ShapeRanges) -> StoredEngine:
    return store.build(stored, shapes, write_small, never_waits)


def mismatch(store: EngineStore, asked: EngineIdentity, shapes: ShapeRanges) -> str:
    with pytest.raises(EngineMismatchError) as caught:
        store.find(asked, shapes, COMMAND)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(f"; build it: {COMMAND}")
    return message


def leftovers(store: EngineStore) -> list[str]:
    """What is in the store's folder besides finished engines and lock files."""
    engines, _ = store.scan()
    keys = {engine.key for engine in engines}
    return [p.name for p in store.root.iterdir() if p.name not in keys and not p.name.endswith(".lock")]


# Finding


def test_an_empty_store_says_what_to_type(store: EngineStore) -> None:
    assert mismatch(store, identity(), ranges()) == f"no engine in {store.root}; build it: {COMMAND}"
    assert not store.root.exists()


def test_what_was_built_is_found_with_all_it_holds(store: EngineStore) -> None:
    built = add(store, identity(), ranges())
    found = EngineStore(store.root).find(identity(), ranges(), COMMAND)
    assert found == built == store.get(identity(), ranges())
    assert found.folder == store.root / engine_key(identity(), ranges())
    assert (found.folder / "denoiser.onnx").read_bytes() == b"graph"
    assert found.files == {"denoiser.onnx": 5, "weights/denoiser.data": 1000}
    assert found.bytes == 1005
    assert found.details == {"versions": {"onnx": "1.22"}, "errors": {"denoiser": 1e-6}}
    assert leftovers(store) == []


def test_the_manifest_can_be_read_by_a_person(store: EngineStore) -> None:
    built = add(store, identity(), ranges(height=Range(512, 1024)))
    manifest = json.loads((built.folder / "manifest.json").read_text())
    assert manifest["identity"]["numerics"]["precision"] == "fp16"
    assert {"component": "unet", "name": "unet.safetensors", "blake3": digest("a")} in manifest["identity"]["weights"]
    assert manifest["identity"]["loras"] == [{"name": "style.safetensors", "blake3": digest("d"), "scale": 0.8}]
    assert manifest["identity"]["build_options"] == {"opset": "23", "export version": "1"}
    assert manifest["ranges"]["height"] == {"minimum": 512, "maximum": 1024}
    assert manifest["ranges"]["max_frames"] == 4
    assert datetime.fromisoformat(manifest["created"]).tzinfo is not None
    assert manifest["build_seconds"] >= 0
    assert manifest["versions"].keys() == {"storyadapter-trt", "python"}


def test_an_engine_that_covers_more_serves_and_the_smallest_is_taken(store: EngineStore) -> None:
    huge = add(store, identity(), ranges(8, 100, Range(512, 2048), Range(512, 2048)))
    wide = add(store, identity(), ranges(8, 100, Range(512, 1024), Range(512, 1024)))
    many = add(store, identity(), ranges(8, 200, Range(1024, 1024), Range(1024, 1024)))
    fixed = add(store, identity(), ranges(8, 100, 1024, 1024))
    assert store.find(identity(), ranges(5, 7, 1024, 1024), COMMAND) == fixed
    assert store.find(identity(), ranges(8, 150, 1024, 1024), COMMAND) == many
    assert store.find(identity(), ranges(1, 1, 768, 512), COMMAND) == wide
    assert store.find(identity(), ranges(1, 1, 1056, 512), COMMAND) == huge


def test_asking_for_less_does_not_stop_the_building_of_exactly_that(store: EngineStore) -> None:
    add(store, identity(), ranges(8))
    assert add(store, identity(), ranges(4)).ranges.max_frames == 4
    assert len(store.scan()[0]) == 2


NEW_UNET = WeightFile("unet", "juggernaut.safetensors", digest("9"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (identity(precision="fp32"), "precision is fp16 in the store, fp32 asked for"),
        (identity(backend="tensorrt"), "backend is onnxruntime in the store, tensorrt asked for"),
        (identity(backend_version="1.25.0"), "backend version is 1.24.1 in the store, 1.25.0 asked for"),
        (identity(architecture="sm90"), "architecture is cpu-x86_64 in the store, sm90 asked for"),
        (
            identity(contract=digest("f")),
            "contract is eeeeeeee in the store, ffffffff asked for (a model of other sizes, or another version of "
            "this program)",
        ),
        (
            identity(weights=(NEW_UNET, VAE, TEXT)),
            "unet weights are unet.safetensors (blake3 aaaaaaaa) in the store, "
            "juggernaut.safetensors (blake3 99999999) asked for",
        ),
        (
            identity(weights=(UNET, VAE, TEXT, replace(NEW_UNET, component="vae"))),
            "vae weights are without juggernaut.safetensors (blake3 99999999) in the store, "
            "juggernaut.safetensors (blake3 99999999) asked for",
        ),
        (
            identity(weights=(UNET, TEXT)),
            "vae weights are vae.safetensors (blake3 bbbbbbbb) in the store, none asked for",
        ),
        (
            identity(weights=(NEW_UNET, replace(NEW_UNET, component="vae", blake3=digest("8")), TEXT)),
            "the weights of unet and vae are others in the store than asked for",
        ),
        (
            identity(loras=()),
            "LoRA is style.safetensors:0.8 (blake3 dddddddd) in the store, none asked for",
        ),
        (
            identity(loras=(FusedLora("style.safetensors", digest("d"), 0.5),)),
            "LoRA is style.safetensors:0.8 (blake3 dddddddd) in the store, "
            "style.safetensors:0.5 (blake3 dddddddd) asked for",
        ),
        (
            identity(build_options=(("opset", "18"), ("export version", "1"))),
            "opset is 23 in the store, 18 asked for",
        ),
        (
            identity(build_options=(("opset", "23"), ("export version", "1"), ("prediction type", "v_prediction"))),
            "prediction type is not set in the store, v_prediction asked for",
        ),
    ],
)
def test_the_field_that_differs_is_named(store: EngineStore, asked: EngineIdentity, words: str) -> None:
    built = add(store, identity(), ranges())
    assert mismatch(store, asked, ranges()) == (
        f"no engine in {store.root} fits; the closest, onnxruntime fp16 for 4 frames of 512x512 and 100 references "
        f"({built.key[:8]}), differs: {words}; build it: {COMMAND}"
    )


def test_an_engine_is_told_by_width_and_height(store: EngineStore) -> None:
    wide = ShapeRanges(4, 100, height=Range(512, 512), width=Range(768, 1024))
    assert str(add(store, identity(), wide)).startswith("onnxruntime fp16 for 4 frames of 768..1024x512 and 100 ")


def test_one_file_of_several_components_is_told_once(store: EngineStore) -> None:
    components = ("unet", "text_encoder", "vae")
    old = tuple(WeightFile(c, "sdxl.safetensors", digest("1")) for c in components)
    new = tuple(WeightFile(c, "other.safetensors", digest("2")) for c in components)
    add(store, identity(weights=old), ranges())
    assert (
        "differs: text_encoder, unet and vae weights are sdxl.safetensors (blake3 11111111) in the store, "
        "other.safetensors (blake3 22222222) asked for; build it"
    ) in mismatch(store, identity(weights=new), ranges())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (ranges(max_frames=5), "max frames is 4, 5 asked for"),
        (ranges(max_references=101), "max references is 100, 101 asked for"),
        (ranges(height=1024), "height is 512..768, 1024 asked for"),
        (ranges(width=256), "width is 512, 256 asked for"),
        (ranges(height=Range(512, 800)), "height is 512..768, 512..800 asked for"),
    ],
)
def test_the_range_that_is_too_small_is_named(store: EngineStore, asked: ShapeRanges, words: str) -> None:
    add(store, identity(), ranges(height=Range(512, 768)))
    assert f", differs: {words}; build it: " in mismatch(store, identity(), asked)


def test_every_difference_to_the_closest_engine_is_named(store: EngineStore) -> None:
    add(store, identity(backend="tensorrt", backend_version="10.14"), ranges())  # one field, but another backend
    add(store, identity(precision="bf16", architecture="sm90", contract=digest("f")), ranges())
    add(store, identity(precision="bf16"), ranges(max_frames=2))
    message = mismatch(store, identity(), ranges())
    assert "differs: precision is bf16 in the store, fp16 asked for; max frames is 2, 4 asked for; build it" in message


# Building


def test_an_engine_that_is_there_is_not_built_again(store: EngineStore) -> None:
    built = add(store, identity(), ranges())

    def build_again(folder: Path) -> dict[str, Any]:
        raise AssertionError("built twice")

    assert store.build(identity(), ranges(), build_again, never_waits) == built


def test_nothing_is_to_be_seen_before_the_build_is_finished(store: EngineStore) -> None:
    def write(folder: Path) -> dict[str, Any]:
        details = write_small(folder)
        assert folder.stat().st_dev == store.root.stat().st_dev
        assert store.scan() == ([], [])
        assert store.get(identity(), ranges()) is None
        return details

    assert store.build(identity(), ranges(), write, never_waits) == store.get(identity(), ranges())


@pytest.mark.parametrize("error", [RuntimeError("refused op"), KeyboardInterrupt(), OSError("a checkpoint's")])
def test_a_build_that_fails_leaves_nothing_and_its_error_is_kept(store: EngineStore, error: BaseException) -> None:
    def write(folder: Path) -> dict[str, Any]:
        write_small(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        store.build(identity(), ranges(), write, never_waits)
    assert caught.value is error
    assert store.scan() == ([], [])
    assert leftovers(store) == []
    add(store, identity(), ranges())


def test_details_that_are_no_plain_data_finish_nothing(store: EngineStore) -> None:
    with pytest.raises(TypeError):
        store.build(identity(), ranges(), lambda folder: {"path": folder}, never_waits)
    assert store.scan() == ([], [])
    assert leftovers(store) == []


def _plainly(folder: Path) -> None:
    (folder / "denoiser.onnx").write_bytes(bytes(1 << 20))


def _by_numpy(folder: Path) -> None:
    with (folder / "denoiser.data").open("wb") as file:
        np.zeros(1 << 20, np.uint8).tofile(file)


def _by_pytorch(folder: Path) -> None:
    torch.save(torch.zeros(1 << 18), folder / "denoiser.pt")


def _by_safetensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(1 << 18)}, folder / "denoiser.safetensors")


def _by_onnx(folder: Path) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(1 << 18, np.float32), "weight")
    graph = onnx.helper.make_graph([], "graph", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), folder / "denoiser.onnx", save_as_external_data=True, location="data")


@pytest.mark.parametrize("save", [_plainly, _by_numpy, _by_pytorch, _by_safetensors, _by_onnx])
def test_no_room_is_told_in_one_line(store: EngineStore, save: Callable[[Path], None]) -> None:
    """By the process's limit on the size of a file, which stops a write as a full disk does."""

    def write(folder: Path) -> dict[str, Any]:
        save(folder)
        return {}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(RunError) as caught:
            store.build(identity(), ranges(), write, never_waits)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = re.fullmatch(
        rf"{re.escape(str(store.root))}\S* can't be written: (File too large|no more can be written .*); "
        "make room, or choose another folder with --engine-dir",
        typed(caught.value),
    )
    assert told, typed(caught.value)
    assert leftovers(store) == []


# Folders that are no engines


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = folder / "manifest.json"
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new))

    return edit


def _shorten_weights(folder: Path) -> None:
    (folder / "weights" / "denoiser.data").write_bytes(b"short")


def _remove_weights(folder: Path) -> None:
    shutil.rmtree(folder / "weights")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove_manifest, "manifest.json can't be read (No such file or directory)"),
        (_cut_manifest, "manifest.json is not valid JSON"),
        (_edit('"store_version": 6', '"store_version": 99'), "its store version is 99, expected 6"),
        (_edit('"identity"', '"identify"'), "manifest.json is no manifest of an engine (KeyError('identity'))"),
        (_edit('"max_frames": 4', '"max_frames": "x"'), "manifest.json is no manifest of an engine (TypeError"),
        (_edit('"max_frames": 4', '"max_frames": 0'), "manifest.json is no manifest of an engine (InputError"),
        (_edit('"max_frames": 4', '"max_frames": 400'), "manifest.json is that of another engine"),
        (_edit("fp16", "fp32"), "manifest.json is that of another engine"),
        (_edit("1e-06", "2e-06"), "manifest.json isn't what was written"),
        (_shorten_weights, "weights/denoiser.data has 5 bytes, expected 1000"),
        (_remove_weights, "weights/denoiser.data can't be read (No such file or directory)"),
    ],
)
def test_a_damaged_engine_is_passed_over_told_and_built_anew(
    store: EngineStore, damage: Callable[[Path], None], reason: str
) -> None:
    good = add(store, identity(precision="bf16"), ranges())
    damaged = add(store, identity(), ranges())
    damage(damaged.folder)
    engines, warnings = store.scan()
    assert engines == [good]
    (warning,) = warnings
    assert warning.startswith(f"{damaged.folder} is no usable engine: {reason}")
    message = mismatch(store, identity(), ranges())
    assert f"precision is bf16 in the store, fp16 asked for; {warning}; build it" in message
    assert add(store, identity(), ranges()).key == damaged.key
    assert store.scan()[1] == []
    assert store.find(identity(), ranges(), COMMAND).key == damaged.key


@pytest.mark.parametrize("name", ["denoiser.onnx", "weights/denoiser.data"])
@pytest.mark.parametrize("bytes_", [1, 5])
def test_a_file_of_unchanged_size_is_told_and_built_anew(store: EngineStore, name: str, bytes_: int) -> None:
    built = add(store, identity(), ranges())
    assert built.is_new and built.damage() is None and not add(store, identity(), ranges()).is_new
    with (built.folder / name).open("r+b") as file:
        file.write(b"\1" * bytes_)
    assert store.find(identity(), ranges(), COMMAND).damage() == f"{name} isn't what was built"
    assert store.get(identity(), ranges()) is None
    repaired = add(store, identity(), ranges())
    assert repaired.is_new and repaired.folder == built.folder and repaired.damage() is None


def test_engines_of_older_store_versions_are_told_once_with_what_removes_them(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "my engines")
    for version, precision in ((1, "fp32"), (3, "bf16")):
        _edit('"store_version": 6', f'"store_version": {version}')(
            add(store, identity(precision=precision), ranges()).folder
        )
    good = add(store, identity(), ranges())
    engines, (warning,) = store.scan()
    assert engines == [good]
    told, _, command = warning.partition("; to remove what is outdated: ")
    assert told == "2 outdated engines (store version below 6): build again what is still wanted"
    assert warning in mismatch(store, identity(precision="fp32"), ranges())
    subprocess.run(command, shell=True, check=True)
    assert store.scan() == ([good], [])


def test_other_things_in_the_folder_do_no_harm(store: EngineStore) -> None:
    built = add(store, identity(), ranges())
    (store.root / "notes.txt").write_text("mine")
    (store.root / "photos").mkdir()
    engines, warnings = store.scan()
    assert engines == [built]
    assert warnings == [
        f"{store.root / 'photos'} is no usable engine: manifest.json can't be read (No such file or directory)"
    ]


# Folders that can't be used


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may read but not write, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mask = os.umask(0o022)
        add(EngineStore(folder), identity(), ranges())
        os.umask(mask)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_store_that_cannot_be_written_still_serves_what_it_has(locked_folder: Path) -> None:
    store = EngineStore(locked_folder)
    found = store.find(identity(), ranges(), COMMAND)
    assert add(store, identity(), ranges()) == found
    for root in (locked_folder, locked_folder / "below"):
        with pytest.raises(InputError) as caught:
            add(EngineStore(root), identity(precision="fp32"), ranges())
        assert typed(caught.value) == (
            f"{root} can't be written: Permission denied; choose another folder with --engine-dir"
        )


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    path.write_bytes(b"")
    store = EngineStore(path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} can't be read: Not a directory; choose another"):
        store.find(identity(), ranges(), COMMAND)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} can't be written: File exists; choose another"):
        add(store, identity(), ranges())


def test_the_default_place_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineStore().root == tmp_path / "storyadapter-trt" / "engines"


# Several processes, and processes that die


def _build_and_hang(root: Path, written: Event) -> None:
    def write(folder: Path) -> dict[str, Any]:
        write_small(folder)
        written.set()
        time.sleep(600)
        return {}

    EngineStore(root).build(identity(), ranges(), write, never_waits)


@pytest.mark.parametrize("next_precision", ["fp16", "fp32"], ids=["same key", "another key"])
def test_a_killed_build_leaves_a_usable_store(store: EngineStore, next_precision: str) -> None:
    written = SPAWN.Event()
    process = SPAWN.Process(target=_build_and_hang, args=(store.root, written), daemon=True)
    process.start()
    assert written.wait(60)
    # while it lives, neither the build of another engine nor a look at the store disturbs it
    (unfinished,) = store.root.glob(".*.building")
    add(store, identity(precision="bf16"), ranges())
    assert (unfinished / "denoiser.onnx").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert unfinished.exists()
    assert [engine.identity.numerics.precision for engine in store.scan()[0]] == ["bf16"]
    assert store.scan()[1] == []
    assert store.get(identity(), ranges()) is None
    add(store, identity(precision=next_precision), ranges())
    assert store.scan()[1] == []
    assert leftovers(store) == []


def _build_many(root: Path, started: Event) -> None:
    started.set()
    for number in range(100000):
        EngineStore(root).build(identity(contract=f"{number:064x}"), ranges(), write_small, never_waits)


@pytest.mark.parametrize("milliseconds", [31, 73, 128])
def test_killed_at_any_moment_no_engine_is_half_finished(store: EngineStore, milliseconds: int) -> None:
    started = SPAWN.Event()
    process = SPAWN.Process(target=_build_many, args=(store.root, started), daemon=True)
    process.start()
    assert started.wait(60)
    time.sleep(milliseconds / 1000)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    engines, warnings = store.scan()
    assert warnings == []
    for engine in engines:
        assert (engine.folder / "weights" / "denoiser.data").read_bytes() == bytes(1000)
    add(store, identity(), ranges())
    assert leftovers(store) == []


def test_a_reader_never_sees_a_part_of_an_engine(store: EngineStore) -> None:
    done = threading.Event()

    def write_slowly(folder: Path) -> dict[str, Any]:
        for number in range(5):
            (folder / f"{number}.data").write_bytes(bytes(1000))
            time.sleep(0.002)
        return {}

    def build_ten() -> None:
        for number in range(10):
            store.build(identity(contract=f"{number:064x}"), ranges(), write_slowly, never_waits)
        done.set()

    builder = threading.Thread(target=build_ten)
    builder.start()
    counts = []
    while not done.is_set():
        engines, warnings = store.scan()
        assert warnings == []
        assert all(len(engine.files) == 5 for engine in engines)
        counts.append(len(engines))
    builder.join()
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert len(store.scan()[0]) == 10


def _build_together(
    root: Path, first_writes: Event, second_waits: Event, results: "multiprocessing.Queue[Any]"
) -> None:
    built, waited = [], []

    def write(folder: Path) -> dict[str, Any]:
        first_writes.set()
        assert second_waits.wait(60)
        built.append(True)
        return write_small(folder)

    def on_wait(message: str) -> None:
        waited.append(message)
        second_waits.set()

    engine = EngineStore(root).build(identity(), ranges(), write, on_wait)
    results.put((bool(built), waited, engine.key, engine.created))


def test_two_builders_of_one_key_give_one_engine_and_the_second_says_that_it_waits(store: EngineStore) -> None:
    first_writes, second_waits, results = SPAWN.Event(), SPAWN.Event(), SPAWN.Queue()
    arguments = (store.root, first_writes, second_waits, results)
    processes = [SPAWN.Process(target=_build_together, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = sorted((results.get(timeout=60) for _ in processes), reverse=True)
    for process in processes:
        process.join()
    (first_built, first_waited, *first_engine), (second_built, second_waited, *second_engine) = outcomes
    assert (first_built, first_waited) == (True, [])
    assert not second_built
    assert second_waited == [f"another process is building this engine in {store.root}; waiting until it is done"]
    assert first_engine == second_engine
    assert len(store.scan()[0]) == 1
    assert leftovers(store) == []


def test_when_the_first_builder_is_killed_the_second_builds(store: EngineStore) -> None:
    written = SPAWN.Event()
    process = SPAWN.Process(target=_build_and_hang, args=(store.root, written), daemon=True)
    process.start()
    assert written.wait(60)
    waited: list[str] = []

    def kill_the_first(message: str) -> None:
        waited.append(message)
        os.kill(process.pid, signal.SIGKILL)

    engine = store.build(identity(), ranges(), write_small, kill_the_first)
    process.join()
    assert len(waited) == 1
    assert engine.files == {"denoiser.onnx": 5, "weights/denoiser.data": 1000}
    assert leftovers(store) == []
