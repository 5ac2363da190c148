"""Hashes of weight files are right, and remembered."""

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storyadapter.engine import fingerprint
from storyadapter.method.errors import CheckpointError


def fingerprint_files(*arguments: Any, **options: Any) -> dict[Path, str]:
    return fingerprint.fingerprint_files(*arguments, **options).digests


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fingerprints.json"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def no_reading(done: int, total: int) -> None:
    raise AssertionError(f"{done} of {total} bytes were read")


def test_hashes_are_those_of_the_whole_over_several_chunks(tmp_path: Path, memory: Path) -> None:
    contents = {"empty": b"", "small": b"weights", "large": os.urandom((9 << 20) + 17)}
    paths = [write(tmp_path / name, content) for name, content in contents.items()]
    seen: list[tuple[int, int]] = []
    digests = fingerprint_files(paths, lambda done, total: seen.append((done, total)), memory)
    assert digests == {path: blake3(contents[path.name]).hexdigest() for path in paths}
    total = sum(map(len, contents.values()))
    assert {t for _, t in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == total
    assert len(seen) >= 4  # three chunks of the large file, one of the small


def test_a_remembered_file_is_not_read(tmp_path: Path, memory: Path) -> None:
    path = write(tmp_path / "unet.safetensors", b"content")
    first = fingerprint.fingerprint_files([path], memory=memory)
    assert not first.remembered
    again = fingerprint.fingerprint_files([path], no_reading, memory)
    assert again == (first.digests, {path})


def test_other_content_under_the_same_size_and_time_is_read(tmp_path: Path, memory: Path) -> None:
    """As of a copy that keeps times: nobody sets the time at which the system itself saw a change."""
    path = write(tmp_path / "unet.safetensors", b"old content")
    status = path.stat()
    fingerprint_files([path], memory=memory)
    write(path, b"new content")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_files([path], memory=memory)[path] == blake3(b"new content").hexdigest()


def test_bytes_that_changed_under_the_system_are_seen_where_all_are_read_anew(tmp_path: Path, memory: Path) -> None:
    path = write(tmp_path / "unet.safetensors", b"content")
    right = fingerprint_files([path], memory=memory)
    memory.write_text(memory.read_text().replace(right[path], "0" * 64))  # as if others had been hashed
    assert fingerprint_files([path], no_reading, memory) == {path: "0" * 64}
    assert fingerprint.fingerprint_files([path], memory=memory, anew=True) == (right, frozenset())
    assert fingerprint_files([path], no_reading, memory) == right


def test_another_size_under_the_same_time_is_read(tmp_path: Path, memory: Path) -> None:
    path = write(tmp_path / "unet.safetensors", b"short")
    status = path.stat()
    fingerprint_files([path], memory=memory)
    write(path, b"longer than before")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_files([path], memory=memory)[path] == blake3(b"longer than before").hexdigest()


def test_a_link_and_its_target_are_one_file_read_once(tmp_path: Path, memory: Path) -> None:
    target = write(tmp_path / "blob", b"x" * 1000)
    link = tmp_path / "model.safetensors"
    link.symlink_to(target)
    seen: list[tuple[int, int]] = []
    digests = fingerprint_files([link, target, link], lambda done, total: seen.append((done, total)), memory)
    assert digests == {path: blake3(b"x" * 1000).hexdigest() for path in (link, target)}
    assert seen == [(1000, 1000)]


def test_a_file_that_grows_while_it_is_read_is_refused_and_not_remembered(tmp_path: Path, memory: Path) -> None:
    finished = write(tmp_path / "vae.safetensors", b"done")
    path = write(tmp_path / "unet.safetensors", b"first part")

    def download_goes_on(done: int, total: int) -> None:
        if done > len(b"done") and path.stat().st_size == len(b"first part"):
            with path.open("ab") as file:
                file.write(b", second part")

    with pytest.raises(CheckpointError) as caught:
        fingerprint_files([finished, path], download_goes_on, memory)
    assert str(caught.value) == (
        f"{path} changed while it was read; wait until it is written completely, then try again"
    )
    assert "\n" not in str(caught.value)
    assert set(json.loads(memory.read_bytes())["files"]) == {str(finished)}
    assert fingerprint_files([path], memory=memory)[path] == blake3(b"first part, second part").hexdigest()


def test_a_file_rewritten_while_it_is_read_is_refused(tmp_path: Path, memory: Path) -> None:
    path = write(tmp_path / "unet.safetensors", b"a" * 100)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        fingerprint_files([path], lambda done, total: path.write_bytes(b"b" * 100), memory)


def test_a_missing_file_and_a_folder_are_told_in_one_line(tmp_path: Path, memory: Path) -> None:
    with pytest.raises(CheckpointError, match="^.*none.safetensors can't be read: No such file or directory$"):
        fingerprint_files([tmp_path / "none.safetensors"], memory=memory)
    with pytest.raises(CheckpointError, match="can't be read: Is a directory$"):
        fingerprint_files([tmp_path], memory=memory)


def test_an_interrupt_keeps_what_was_read(tmp_path: Path, memory: Path) -> None:
    first, second = write(tmp_path / "first", b"1" * 10), write(tmp_path / "second", b"2" * 10)

    def interrupt(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fingerprint_files([first, second], interrupt, memory)
    assert fingerprint_files([first], no_reading, memory)[first] == blake3(b"1" * 10).hexdigest()


def entry_variants(good: dict[str, Any]) -> st.SearchStrategy[Any]:
    json_values = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just([]) | st.just({})
    broken = st.tuples(st.sampled_from(sorted(good)), json_values).map(lambda pair: good | {pair[0]: pair[1]})
    return json_values | broken


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.data())
def test_a_corrupt_memory_is_made_anew(tmp_path: Path, data: st.DataObject) -> None:
    path, memory = write(tmp_path / "weights", b"content"), tmp_path / "fingerprints.json"
    status = path.stat()
    good = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns, "blake3": "0" * 64}
    files = data.draw(entry_variants({str(path): "entry"}) | entry_variants(good).map(lambda e: {str(path): e}))
    corrupt = data.draw(
        st.binary(max_size=20)
        | st.sampled_from([b"[" * 100000])
        | st.just(json.dumps({"version": 2, "files": files}).encode())
    )
    memory.write_bytes(corrupt)
    assert fingerprint_files([path], memory=memory)[path] == blake3(b"content").hexdigest()
    assert fingerprint_files([path], no_reading, memory)[path] == blake3(b"content").hexdigest()


def test_a_memory_that_cannot_be_written_is_a_warning(
    tmp_path: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "weights", b"content")
    memory.parent.write_bytes(b"a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert fingerprint_files([path], memory=memory)[path] == blake3(b"content").hexdigest()
    (record,) = caplog.records
    assert "the weights will be read again next time" in record.getMessage()
    assert "File exists" in record.getMessage() or "Not a directory" in record.getMessage()


def _hash_many(folder: Path, memory: Path, start: int) -> None:
    for number in range(start, start + 20):
        fingerprint_files([folder / str(number)], memory=memory)


def test_processes_at_once_lose_nothing(tmp_path: Path, memory: Path) -> None:
    for number in range(60):
        write(tmp_path / str(number), str(number).encode())
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_hash_many, args=(tmp_path, memory, start), daemon=True) for start in (0, 20, 40)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    paths = [tmp_path / str(number) for number in range(60)]
    digests = fingerprint_files(paths, no_reading, memory)
    assert digests == {path: blake3(path.name.encode()).hexdigest() for path in paths}


def test_the_memory_stays_small(tmp_path: Path, memory: Path) -> None:
    paths = [write(tmp_path / str(number), b"x") for number in range(1005)]
    fingerprint_files(paths[:1000], memory=memory)
    fingerprint_files(paths[1000:], memory=memory)
    assert set(json.loads(memory.read_bytes())["files"]) == {str(path) for path in paths[5:]}


def test_the_default_place_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = write(tmp_path / "weights", b"content")
    fingerprint_files([path])
    memory = tmp_path / "xdg" / "storyadapter-trt" / "fingerprints.json"
    assert str(path) in json.loads(memory.read_bytes())["files"]


def test_large_files_are_read_at_once_and_an_interrupt_ends_all(tmp_path: Path, memory: Path) -> None:
    paths = [write(tmp_path / str(number), bytes([number]) * (65 << 20)) for number in range(3)]
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fingerprint_files(paths, interrupt, memory)
    assert len(seen) == 5
    done = []
    digests = fingerprint_files(paths, lambda count, total: done.append(count), memory)
    assert done == sorted(done) and done[-1] == 3 * (65 << 20)
    assert digests == {path: blake3(path.read_bytes()).hexdigest() for path in paths}
