"""The one place where backends and the method meet."""

from pathlib import Path

import pytest

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine import open_networks
from storyadapter.errors import EngineMismatchError, UnavailableError


def test_a_device_that_a_backend_does_not_run_on_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"^backend onnxruntime runs on cpu here; cuda:1 asked for; expected no device"
    ):
        open_networks(checkpoint, backend="onnxruntime", device="cuda:1", engine_dir=tmp_path)
    with pytest.raises(EngineMismatchError):  # its own: it goes on and finds no engine
        open_networks(checkpoint, backend="onnxruntime", device="cpu", engine_dir=tmp_path)
