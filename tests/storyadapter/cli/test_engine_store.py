"""`engines list` and `engines prune`: what is there; only what was named goes, the least recently used first."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.store import EngineStore, StoredEngine, manifest_hash
from storyadapter.engine.uses import hold, note_use
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import Numerics
from tests.engine.engine_requests import identify, never_waits
from tests.storyadapter.cli.running import Type

MIB = 1 << 20
DAY = 86400


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def engines(store: EngineStore, checkpoint: Checkpoint) -> list[StoredEngine]:
    """Used 40, 20 and 0 days ago, 3 MiB each; the second is of an older version of the program."""
    asked = identify(checkpoint, "onnxruntime", Numerics.of("fp16", vae_decoder="fp32"))
    sizes = Range(768, 1024)
    built = []

    def write(folder: Path) -> dict[str, Any]:
        (folder / "denoiser.onnx").write_bytes(bytes(3 * MIB))
        return {"geometry": checkpoint.geometry.as_dict()}

    for days, identity in ((40, asked), (20, replace(asked, build_options=(("opset", "18"),))), (0, asked)):
        engine = store.build(identity, ShapeRanges(8, 100 + days, sizes, sizes), write, never_waits)
        note_use(engine.folder, "a" * 32, f"model {days}")
        for path in (engine.folder / "uses").iterdir():
            os.utime(path, (time.time() - days * DAY - 60,) * 2)
        built.append(replace(engine, created="2020-01-01T00:00:00+00:00"))
        manifest = engine.folder / "manifest.json"
        said = json.loads(manifest.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}
        manifest.write_text(json.dumps(said | {"manifest_hash": manifest_hash(said)}))
    return built


def test_the_table_tells_all_in_80_columns(type_in: Type, store: EngineStore, engines: list[StoredEngine]) -> None:
    done = type_in("engines", "list", "--engine-dir", store.root)
    assert done.code == 0 and done.err == ""
    first, head, *rows = done.out.splitlines()
    assert first == f"3 engines in {store.root}"
    assert head.split() == ["key", "backend", "numerics", "frames", "of", "WxH,", "references", "size", "used"]
    assert max(map(len, [head, *rows[:-1]])) <= 80
    assert rows[0] == f"{engines[2].key[:8]}  onnxruntime  fp16/fp32  8 of 768..1024x768..1024, 100    3 MiB  today"
    assert rows[1] == "          for model 0"
    assert rows[2].startswith(engines[1].key[:8]) and rows[2].endswith("  20 d")
    assert rows[4].startswith("          outdated: opset is 18 in the store, ")
    assert rows[-1].strip() == f"storyadapter-trt engines prune --engine-dir {store.root} --outdated"


def test_an_empty_store(type_in: Type, store: EngineStore) -> None:
    done = type_in("engines", "list", "--engine-dir", store.root)
    assert done.out == f"0 engines in {store.root}\n"
    done = type_in("engines", "prune", "--outdated", "--engine-dir", store.root)
    assert done.out == f"freed 0 MiB in {store.root}; 0 MiB are left\n"


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (("--older-than", "30"), [0]),
        (("--older-than", "10"), [0, 1]),
        (("--older-than", "50"), []),
        (("--outdated",), [1]),
        (("--outdated", "--older-than", "30"), [0, 1]),
        (("--keep-under", str(7 / 1024)), [0]),
        (("--keep-under", str(5 / 1024)), [0, 1]),
        (("--keep-under", "0"), [0, 1, 2]),
        (("--keep-under", "1"), []),
        (("--outdated", "--keep-under", str(7 / 1024)), [1]),
        (("--outdated", "--keep-under", str(4 / 1024)), [1, 0]),
    ],
)
def test_what_is_named_goes(
    type_in: Type, store: EngineStore, engines: list[StoredEngine], words: tuple[str, ...], gone: list[int]
) -> None:
    for dry in (("--dry-run",), ()):
        done = type_in("engines", "prune", *words, *dry, "--engine-dir", store.root)
        assert done.code == 0, done.err
        *removed, last = done.out.splitlines()
        told = "would remove" if dry else "removed"
        assert [line.partition(" for 8 frames")[0] for line in removed] == [f"{told} onnxruntime fp16"] * len(gone)
        assert all(engines[index].key[:8] in line for index, line in zip(gone, removed, strict=True))
        left = 3 * (3 - len(gone))
        freed = "would free" if dry else "freed"
        assert last == f"{freed} {3 * len(gone)} MiB in {store.root}; {left} MiB are left"
        there = {engine.key for engine in store.scan()[0]}
        kept = range(3) if dry else [index for index in range(3) if index not in gone]
        assert there == {engines[index].key for index in kept}


def test_engines_are_verified(type_in: Type, store: EngineStore, engines: list[StoredEngine]) -> None:
    done = type_in("engines", "verify", "--engine-dir", store.root)
    assert done.code == 0
    *told, last = done.out.splitlines()
    assert sorted(told) == sorted(f"{engine} in {engine.folder}: whole" for engine in engines)
    assert last == "3 engines read"
    with (engines[1].folder / "denoiser.onnx").open("r+b") as file:
        file.write(b"\1")
    (engines[2].folder / "manifest.json").write_bytes(b"{}")
    done = type_in("engines", "verify", "--engine-dir", store.root)
    assert done.code == 1
    assert f"{engines[1]} in {engines[1].folder}: denoiser.onnx isn't what was built\n" in done.out
    assert f"{engines[2].folder} is no usable engine: its store version is None, expected 6\n2 engines read" in done.out


def test_what_is_in_use_stays_and_the_next_goes(type_in: Type, store: EngineStore, engines: list[StoredEngine]) -> None:
    release = hold(engines[0].folder)
    done = type_in("engines", "prune", "--keep-under", str(7 / 1024), "--engine-dir", store.root)
    release()
    kept, removed, last = done.out.splitlines()
    assert kept == f"kept {engines[0]} for model 40: it is in use or being built"
    assert removed == f"removed {engines[1]} for model 20, 3 MiB" and last.startswith("freed 3 MiB in ")


def test_engines_of_older_stores_go_as_outdated(type_in: Type, store: EngineStore, engines: list[StoredEngine]) -> None:
    manifest = engines[2].folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"store_version": 6', '"store_version": 3'))
    assert "1 outdated engine (store version below 6)" in type_in("engines", "list", "--engine-dir", store.root).out
    done = type_in("engines", "prune", "--outdated", "--engine-dir", store.root)
    assert done.out.startswith(f"removed {engines[2].key[:8]}, of an older version, 3 MiB\n")
    assert [engine.key for engine in store.scan()[0]] == [engines[0].key]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            (),
            "engines prune deletes only what it is told to; expected --outdated, --older-than DAYS or --keep-under",
        ),
        (("--dry-run",), "engines prune deletes only what it is told to; expected --outdated"),
        (("--older-than", "-1"), "--older-than is -1; expected 0 or more"),
        (("--keep-under", "nan"), "--keep-under is nan; expected 0 or more"),
    ],
)
def test_what_is_refused(
    type_in: Type, store: EngineStore, engines: list[StoredEngine], words: tuple[str, ...], text: str
) -> None:
    done = type_in("engines", "prune", *words, "--engine-dir", store.root)
    assert done.code == 2 and done.err.startswith(f"storyadapter-trt: error: {text}")
    assert len(store.scan()[0]) == 3
