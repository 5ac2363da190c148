"""A disk that is soon full."""

import subprocess
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size={kib}k tmpfs "$1"'
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def run_on_small_disk(
    kib: int, command: list[str | Path], disk: Path, written: str, kept: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command while a real file system of `kib` KiB is mounted on `disk`, in a namespace of the command's own.

    The disk is gone with the namespace: what is in `written` on it at the end is copied to `kept` first. Skips the test
    where nobody may mount one.

    Args:
        disk: an empty folder.
    """
    mount = _MOUNT.format(kib=kib)
    try:
        allowed = subprocess.run([*_UNSHARE, mount, "sh", disk], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare command to mount a small disk with")
    if allowed.returncode:
        pytest.skip(f"this machine lets nobody mount a small disk: {allowed.stderr.strip()}")
    script = f'{mount} || exit 99; from="$1/$2"; to="$3"; shift 3; "$@"; code=$?; cp -a "$from" "$to" && exit $code'
    return subprocess.run([*_UNSHARE, script, "sh", disk, written, kept, *command], capture_output=True, text=True)
