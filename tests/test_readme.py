"""The Python examples of the documentation run as they stand; commands, options and links of its pages exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from storyadapter.__main__ import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_python_examples_draw_their_frames(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # the second goes on from the first
    code = "".join([*examples, "assert sorted(drawn) == [0, 0, 1, 1], drawn\n"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{iteration}-{frame}.png" for iteration in range(3) for frame in range(2)
    ]


@pytest.mark.parametrize("command", ["build", "run"])
def test_every_option_named_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for name in ("build", "run"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
        known += capsys.readouterr().out
    table = re.search(rf"\| option of `[^|]*{command}.*?\n\n", README, re.DOTALL)
    assert table is not None
    options = set(re.findall(r"--[a-z][a-z-]+", table[0]))
    assert options and all(option in known for option in options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
