"""Stories with pictures of their characters."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.storyadapter.cli.running import Type, files, pictures


@pytest.fixture
def tale(quick_run: list[str]) -> list[str]:
    """A run of a story file that names a picture beside it; Ada is in two of three frames."""
    folder = Path("tales")
    folder.mkdir()
    Image.linear_gradient("L").resize((50, 30)).save(folder / "ada.png")
    characters = {"Ada": {"definition": "a girl", "references": ["ada.png"]}}
    story = {"prompts": ["Ada runs", "a night", "Ada sleeps"], "characters": characters}
    (folder / "tale.json").write_text(json.dumps(story))
    start = quick_run.index("--prompt")
    return [*quick_run[:start], "--story", "tales/tale.json", *quick_run[start + 4 :]]


def test_a_run_with_pictures_is_resumed_and_edited(type_in: Type, tale: list[str]) -> None:
    assert type_in(*tale, "--keep-references").code == 0
    drawn = pictures(Path("out"))
    assert type_in(*tale, "--out", "plain", "--reference-scale", "0").code == 0
    first = [(Path(out, f"iteration-00/frame-{n:03d}.png").read_bytes()) for n in range(3) for out in ("out", "plain")]
    assert [first[2 * n] == first[2 * n + 1] for n in range(3)] == [False, True, False]
    Path("out/iteration-02/frame-001.png").unlink()
    assert type_in(*tale, "--keep-references", "--resume").code == 0
    assert pictures(Path("out")) == drawn
    identity = json.loads(Path("out/story.json").read_text())["identity"]
    assert [len(keys) for keys in identity["references"]] == [1, 0, 1]
    assert type_in("edit", "out", "--frame", "2", "--prompt", "Ada reads").code == 0
    after = pictures(Path("out-edited"))
    changed = {name for name in after if name.startswith("iteration") and after[name] != drawn[name]}
    assert changed == {f"iteration-{iteration:02d}/frame-002.png" for iteration in range(3)}
    assert type_in("edit", "out", "--frame", "1", "--prompt", "Ada at night", "--out", "named").code == 0
    assert type_in("edit", "out", "--frame", "2", "--prompt", "nobody", "--out", "unnamed").code == 0
    keys = [json.loads(Path(out, "story.json").read_text())["identity"]["references"] for out in ("named", "unnamed")]
    assert [[len(of_frame) for of_frame in of_run] for of_run in keys] == [[1, 1, 1], [1, 0, 0]]
    Image.new("RGB", (9, 9)).save("tales/ada.png")
    done = type_in("edit", "out", "--frame", "1", "--prompt", "a fox", "--out", "changed")
    assert done.code == 2 and "out holds another run: references[0][0] is" in done.err and not Path("changed").exists()
    done = type_in(*tale, "--keep-references", "--resume")
    assert done.code == 2 and "out holds another run: references[0][0] is" in done.err


def test_what_is_told_of_them(type_in: Type, tale: list[str], tiny_model: list[str]) -> None:
    done = type_in("story", "check", "tales/tale.json", *tiny_model, "--style", "none")
    assert done.code == 0, done.err
    assert "characters Ada; 1 reference picture\n  a girl runs" in done.out


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "tales/ada.png: there is no such file; expected a picture (PNG, JPEG"),
        (b"no picture", "tales/ada.png is no picture that can be read; expected a picture"),
    ],
)
def test_a_bad_picture_is_told_before_anything_is_written(
    type_in: Type, tale: list[str], data: bytes | None, told: str
) -> None:
    Path("tales/ada.png").unlink()
    if data:
        Path("tales/ada.png").write_bytes(data)
    before = files(Path("."))
    done = type_in(*tale)
    assert done.code == 2
    assert told in done.err and done.err.count("\n") == 1, done.err
    assert files(Path(".")) == before
