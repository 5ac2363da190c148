"""Which commit a report names."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from storyadapter.bench import environment


def _copy(folder: Path) -> ModuleType:
    """The module from another place."""
    path = folder / "bench" / "environment.py"
    path.parent.mkdir(parents=True)
    shutil.copy(environment.__file__, path)
    spec = importlib.util.spec_from_file_location("copied_environment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_of_another_projects_checkout_is_not_ours(tmp_path: Path) -> None:
    _git(tmp_path, "init")
    (tmp_path / "theirs.py").touch()
    _git(tmp_path, "add", "theirs.py")
    _git(tmp_path, "commit", "-m", "theirs")
    installed = _copy(tmp_path / "env" / "site-packages" / "storyadapter")
    assert installed.commit() == "unknown"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "ours now")
    assert re.fullmatch("[0-9a-f]{40}", installed.commit())
    (tmp_path / "theirs.py").write_text("changed")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", installed.commit())
