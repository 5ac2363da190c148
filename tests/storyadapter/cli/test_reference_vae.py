"""`--reference-vae` as it is typed: what a run records, how it goes on, and where it has nothing to do."""

import json
import shlex
from pathlib import Path

import pytest

from tests.reference_vaes import write_reference_vae
from tests.storyadapter.cli.running import Type, pictures


@pytest.fixture
def words(quick_run: list[str]) -> list[str]:
    write_reference_vae(Path("tiny"))
    place = quick_run.index("--iterations")
    quick_run[place : place + 2] = ["--scales", "0.3"]
    return [*quick_run, "--reference-vae", "tiny", "--keep", "last", "--steps", "1"]


def test_a_run_records_it_goes_on_with_it_and_is_edited_with_it(type_in: Type, words: list[str]) -> None:
    assert type_in(*words).code == 0
    record = json.loads(Path("out/story.json").read_text())
    assert {name for name in record["identity"]["weights"] if name.startswith("reference_vae/")} == {
        "reference_vae/config.json",
        "reference_vae/diffusion_pytorch_model.safetensors",
    }
    assert record["sessions"][0]["details"]["files"]["reference_vae"] == str(Path.cwd() / "tiny")
    whole = pictures(Path("out"))
    Path("out/iteration-01/frame-001.png").unlink()
    assert type_in(*words, "--resume").code == 0
    assert pictures(Path("out")) == whole
    without = [word for word in words if word not in ("--reference-vae", "tiny")]
    told = type_in(*without, "--resume").err
    assert "out holds another run: weights.reference_vae/" in told
    assert type_in(*without, "--out", "plain").code == 0
    assert pictures(Path("plain"))["frames/000.png"] != whole["frames/000.png"]
    # a longer story has another last iteration
    longer = ["0.3,0.4" if word == "0.3" else word for word in words]
    assert type_in(*longer, "--out", "long").code == 0
    assert type_in(*longer, "--resume").code == 0
    assert {n: d for n, d in pictures(Path("out")).items() if n.startswith("frames")} == {
        n: d for n, d in pictures(Path("long")).items() if n.startswith("frames")
    }
    assert type_in("edit", "long", "--frame", "1", "--prompt", "the sea").code == 0
    edited = pictures(Path("long-edited"))
    assert edited["frames/001.png"] != pictures(Path("long"))["frames/001.png"]
    assert edited["frames/000.png"] == pictures(Path("long"))["frames/000.png"]


def test_where_it_has_nothing_to_do(type_in: Type, words: list[str]) -> None:
    once = ["--iterations" if word == "--scales" else "0" if word == "0.3" else word for word in words]
    for typed, told in (
        (
            [*words, "--keep", "all"],
            "--reference-vae is given, which decodes what isn't kept; expected --keep last with it",
        ),
        (once, "--reference-vae is given, and no iteration follows the first; leave it out"),
        ([*words, "--reference-vae", "nowhere"], "--reference-vae nowhere: there is no such file or folder"),
    ):
        done = type_in(*typed)
        assert (done.code, done.err) == (2, f"storyadapter-trt: error: {told}\n")
    assert not Path("out").exists()


def test_the_build_command_that_is_told_has_it(type_in: Type, words: list[str], tmp_path: Path) -> None:
    done = type_in(*words, "--backend", "onnxruntime", "--engine-dir", tmp_path / "engines")
    build = shlex.split(done.err.partition("build it: ")[2])
    assert (done.code, build[build.index("--reference-vae") + 1]) == (2, "tiny")
