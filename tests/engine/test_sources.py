"""What a build depends on in this program is told by its sources themselves."""

import sys
from pathlib import Path

import pytest

from storyadapter import export
from storyadapter.engine import inductor, tensorrt
from storyadapter.engine.sources import sources_digest

NAMES = ("house_of_sources.kernels", "house_of_sources.unet")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "house_of_sources"
    for name in ("__init__.py", "unet.py", "other.py", "kernels/__init__.py", "kernels/mlp/tiles.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


@pytest.mark.parametrize("changed", ["unet.py", "kernels/__init__.py", "kernels/mlp/tiles.json", "kernels/new.py"])
def test_a_change_of_a_source_is_seen(house: Path, changed: str) -> None:
    before = sources_digest(NAMES)
    (house / changed).write_text("x = 1\n")
    assert sources_digest(NAMES) != before


def test_a_moved_text_is_seen(house: Path) -> None:
    (house / "kernels" / "one.py").write_text("x = 1\n")
    before = sources_digest(NAMES)
    (house / "kernels" / "one.py").rename(house / "kernels" / "two.py")
    assert sources_digest(NAMES) != before


@pytest.mark.parametrize("changed", ["other.py", "kernels/notes.md"])
def test_other_files_do_not_count(house: Path, changed: str) -> None:
    before = sources_digest(NAMES)
    (house / changed).write_text("x = 1\n")
    assert sources_digest(reversed(NAMES)) == before


def test_this_program_has_what_is_named() -> None:
    for sources in (export.SOURCES, inductor.SOURCES, tensorrt.SOURCES):
        assert len(sources_digest(sources)) == 12
    with pytest.raises(ModuleNotFoundError):
        sources_digest(("storyadapter.no_such_module",))
