"""Who used an engine, and that one in use isn't removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.engine.uses import hold, note_use
from storyadapter.method.errors import RunError
from tests.engine.engine_requests import identity, never_waits, ranges, write_small


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def engine(store: EngineStore) -> StoredEngine:
    return store.build(identity(), ranges(), write_small, never_waits)


def test_uses_are_told_with_model_and_time(engine: StoredEngine) -> None:
    assert engine.uses == {} and time.time() - engine.last_used < 60
    note_use(engine.folder, "a" * 32, "sdxl")
    note_use(engine.folder, "b" * 32, "sdxl + style:0.8", {"errors": {"denoiser": 1e-3}})
    assert [use.model for use in engine.uses.values()] == ["sdxl", "sdxl + style:0.8"]
    assert engine.uses["b" * 32].details == {"errors": {"denoiser": 1e-3}}


def test_a_use_again_is_noted_hourly_and_keeps_what_is_known(engine: StoredEngine) -> None:
    note_use(engine.folder, "a" * 32, "sdxl", {"errors": {}})
    (path,) = engine.folder.glob("uses/*.json")
    for ago, noted in ((600, False), (7200, True)):
        before = time.time() - ago
        os.utime(path, (before, before))
        note_use(engine.folder, "a" * 32, "sdxl")
        assert (time.time() - engine.uses["a" * 32].last < 60) == noted
        assert engine.uses["a" * 32].details == {"errors": {}}


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"model": "sdxl"}', b"[" * 100000])
def test_a_damaged_note_is_none(engine: StoredEngine, damage: bytes) -> None:
    note_use(engine.folder, "a" * 32, "sdxl")
    (path,) = engine.folder.glob("uses/*.json")
    path.write_bytes(damage)
    assert engine.uses == {}
    note_use(engine.folder, "a" * 32, "sdxl")
    assert engine.uses.keys() == {"a" * 32}


def test_where_nothing_can_be_written_a_use_is_a_warning(
    engine: StoredEngine, caplog: pytest.LogCaptureFixture
) -> None:
    (engine.folder / "uses").write_bytes(b"a file where the folder should be")
    note_use(engine.folder, "a" * 32, "sdxl")
    (record,) = caplog.records
    assert record.getMessage().endswith("that this engine was used with sdxl isn't noted")


def test_a_noted_engine_is_whole(store: EngineStore, engine: StoredEngine) -> None:
    note_use(engine.folder, "a" * 32, "sdxl", {"x": 1})
    assert store.scan() == ([engine], [])


def test_an_engine_is_removed_but_not_while_it_is_open(store: EngineStore, engine: StoredEngine) -> None:
    release = hold(engine.folder)
    assert not store.remove(engine.folder) and store.scan() == ([engine], [])
    second = hold(engine.folder)  # as another reader
    release()
    assert not store.remove(engine.folder)
    second()
    assert store.remove(engine.folder) and store.scan() == ([], [])
    assert not store.remove(engine.folder)  # gone already
    with pytest.raises(RunError, match="was removed by another process; type the same command again"):
        hold(engine.folder)


def test_a_process_that_died_holds_nothing(store: EngineStore, engine: StoredEngine) -> None:
    code = (
        "import sys, pathlib, time\nfrom storyadapter.engine.uses import hold\n"
        f"hold(pathlib.Path({str(engine.folder)!r}))\nprint('held', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        assert not store.remove(engine.folder)
        process.kill()
    assert store.remove(engine.folder)


def test_an_engine_that_is_being_built_anew_is_not_removed(store: EngineStore, engine: StoredEngine) -> None:
    (engine.folder / "denoiser.onnx").write_bytes(b"damaged")
    tried = []

    def write(folder: Path) -> dict[str, object]:
        tried.append(store.remove(engine.folder))
        return write_small(folder)

    store.build(identity(), ranges(), write, never_waits)
    assert tried == [False] and len(store.scan()[0]) == 1
