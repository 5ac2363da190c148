"""Where a report goes, and what is told where it can't."""

import json
from pathlib import Path

import pytest

from storyadapter.bench.report import check_out, report_file, table, write_report
from storyadapter.method.errors import InputError, RunError


def test_a_name_with_a_dot_is_a_name(tmp_path: Path) -> None:
    out = tmp_path / "new" / "v1.2"
    check_out(out)
    write_report(out, "a page\n", {"a": 1})
    assert {path.name for path in out.parent.iterdir()} == {"v1.2.md", "v1.2.json"}
    assert report_file(out, "md").read_text(encoding="utf-8") == "a page\n"
    assert json.loads(report_file(out, "json").read_text(encoding="utf-8")) == {"a": 1}


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_out(None)
    write_report(None, "a page", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "/", ".."])
def test_what_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="names no file; expected such as "):
        check_out(Path(name))


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file can't be made: .*; expected a folder that can be written$"):
        check_out(tmp_path / "file" / "report")
    (tmp_path / "report.md").mkdir()
    with pytest.raises(RunError, match=r"report\.md can't be written: Is a directory$"):
        write_report(tmp_path / "report", "a page", {})


def test_a_table_and_its_bars() -> None:
    assert table(("what", "ms"), [["a|b", "1.0"]]) == ["| what | ms |", "| --- | --- |", "| a\\|b | 1.0 |"]
