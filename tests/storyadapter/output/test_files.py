import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storyadapter.method.errors import InputError, RunError
from storyadapter.output.files import is_part, lock_folder, write_atomically, write_error
from tests.refusals import raises_typed


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # as any other file, not mkstemp's 0600


def test_a_file_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    """A real limit of the kernel's: writing beyond it fails in the middle, as a full disk does."""
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    code = f"""
import resource
from pathlib import Path
from storyadapter.cli.options import typed
from storyadapter.method.errors import RunError
from storyadapter.output.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomically(Path({str(path)!r}), bytes(200_000))
except RunError as error:
    print(typed(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{path}: the file size limit is reached; make room, then go on with --resume"
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "a"
    with pytest.raises(RunError, match=r"a can't be written: No such file or directory"):
        write_atomically(path, b"")


def test_write_errors(tmp_path: Path) -> None:
    for number, words in (
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "the file size limit is reached"),
        (errno.EROFS, "can't be written: Read-only file system"),
    ):
        error = write_error(tmp_path, OSError(number, os.strerror(number)))
        assert words in str(error)
        assert error.exit_code == 1


def test_temporary_names() -> None:
    assert is_part(Path("out/.story.json.0123abcd.part"))
    assert not any(is_part(Path(name)) for name in ("story.json", ".lock", "a.part", ".a.part", "x.0123abcd.part"))


def test_lock_keeps_others_out(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(InputError, match="in use by another run; wait until that has ended, or choose another folder"):
        lock_folder(tmp_path)
    code = "from pathlib import Path; from storyadapter.output.files import lock_folder; "
    code += f"lock_folder(Path({str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "in use by another run" in other.stderr
    lock.release()
    lock_folder(tmp_path).release()
    # A process that ends without a word gives its lock back.
    subprocess.run([sys.executable, "-c", code + "; import os; os._exit(9)"])
    lock_folder(tmp_path).release()


def test_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with raises_typed(InputError, match=r"can't be written: .*; choose another folder with --out"):
        lock_folder(tmp_path)
