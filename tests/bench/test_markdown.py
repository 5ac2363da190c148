"""Tables in Markdown."""

from storyadapter.bench.markdown import table


def test_a_table_and_its_bars() -> None:
    assert table(("what", "ms"), [["a|b", "1.0"]]) == ["| what | ms |", "| --- | --- |", "| a\\|b | 1.0 |"]
